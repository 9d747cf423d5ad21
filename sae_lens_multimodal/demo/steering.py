"""Does raising a feature on an object make the model see its attribute there?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sae_lens import SAE

from sae_lens_multimodal.hooks.steer import Set, steer
from sae_lens_multimodal.report.records import SteeringRecord
from sae_lens_multimodal.scenes.questions import attribute_question
from sae_lens_multimodal.scenes.truth import CLEAR_PRECISION, Concept, Truth
from sae_lens_multimodal.scenes.world import Scene, SceneObject, make_scene
from sae_lens_multimodal.types import Box, Modality

if TYPE_CHECKING:
    from sae_lens_multimodal.adapters.model import VisionLanguageModel
    from sae_lens_multimodal.features.store import FeatureStore

STEERED_KINDS = ("colour", "shape")
STRENGTH = 1.5
"""Steered activation as a multiple of the feature's own 99th percentile on image tokens."""
RECORDS_SHOWN = 4
ANSWER_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A question about one of two objects, to be steered, and one about the other, to be left alone."""

    scene: Scene
    target: SceneObject
    question: str
    other_question: str


@dataclass
class SteeringResult:
    """What became of the answers."""

    n_features: int = 0
    n_cases: int = 0
    n_steered: int = 0
    """Answers about the target that became the feature's attribute."""
    n_control: int = 0
    """The same with a random other feature, raised as much."""
    n_others_kept: int = 0
    """Answers about the other object that stayed as they were."""
    records: dict[int, list[SteeringRecord]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return counts and shares."""
        total = max(self.n_cases, 1)
        return {
            "features": self.n_features,
            "cases": self.n_cases,
            "success": self.n_steered / total,
            "random_feature": self.n_control / total,
            "others_kept": self.n_others_kept / total,
        }


def steer_features(
    model: VisionLanguageModel,
    sae: SAE[Any],
    store: FeatureStore,
    truth: Truth,
    *,
    n_scenes: int,
    seed: int,
) -> SteeringResult:
    """Raise the clearest feature of every colour and shape on one object of unseen scenes, and ask about it."""
    rng = np.random.default_rng(seed)
    chosen = best_features(truth)
    result = SteeringResult(n_features=len(chosen))
    others = [t.feature for t in truth.features if t.modality == Modality.IMAGE and t.feature in set(store.features)]
    for concept, feature in chosen.items():
        cases = list(islice(_cases(concept, first_seed=(seed + 1) * 10_000_000 + 1_000 * feature), n_scenes))
        before = model.answer(_conversations(cases), max_new_tokens=ANSWER_TOKENS, batch_size=2 * n_scenes)
        changed = _steered_answers(model, sae, feature, store.scale(feature, "image"), cases)
        control = int(rng.choice([other for other in others if other != feature]))
        controlled = _steered_answers(model, sae, control, store.scale(control, "image"), cases)
        wanted = concept.value
        result.n_cases += len(cases)
        result.n_steered += sum(answer == wanted for answer in changed[0::2])
        result.n_control += sum(answer == wanted for answer in controlled[0::2])
        result.n_others_kept += sum(new == old for new, old in zip(changed[1::2], before[1::2], strict=True))
        edit = f"set to {STRENGTH * store.scale(feature, 'image'):.3g} on the object's patches"
        result.records[feature] = [
            SteeringRecord(prompt=case.question, before=old, after=new, edit=edit, image=case.scene.image)
            for case, old, new in zip(cases[:RECORDS_SHOWN], before[0::2], changed[0::2], strict=False)
        ]
    return result


def best_features(truth: Truth) -> dict[Concept, int]:
    """Return for every colour and shape the feature that fits it best on image tokens, if one is clear."""
    best: dict[Concept, tuple[float, int]] = {}
    for fit in truth.features:
        concept, precision = fit.by_modality[Modality.IMAGE]
        if concept.kind in STEERED_KINDS and precision >= max(CLEAR_PRECISION, best.get(concept, (0.0, 0))[0]):
            best[concept] = (precision, fit.feature)
    return {concept: feature for concept, (_, feature) in sorted(best.items())}


def _cases(concept: Concept, *, first_seed: int) -> Iterator[Case]:
    """Draw scenes of two objects, neither of which has the attribute, and that differ in what they are asked by."""
    key = "shape" if concept.kind == "colour" else "colour"
    for seed in count(first_seed):
        scene = make_scene(seed, n_objects=2)
        objects = [one.attributes for one in scene.objects]
        values = [one[concept.kind] for one in objects]
        if concept.value in values or objects[0][key] == objects[1][key]:
            continue
        asked = [attribute_question(objects, {key: one[key]}, concept.kind).text for one in objects]
        yield Case(scene=scene, target=scene.objects[0], question=asked[0], other_question=asked[1])


def _conversations(cases: Sequence[Case]) -> list[list[dict[str, Any]]]:
    """Write both questions of every case: about the target, about the other, and so on."""
    return [
        [{"role": "user", "content": [{"type": "image", "image": case.scene.image}, {"type": "text", "text": text}]}]
        for case in cases
        for text in (case.question, case.other_question)
    ]


def _steered_answers(
    model: VisionLanguageModel,
    sae: SAE[Any],
    feature: int,
    scale: float,
    cases: Sequence[Case],
) -> list[str]:
    """Answer both questions of every case with the feature raised on the target's patches."""
    conversations = _conversations(cases)
    layout = model.encode(conversations).layout
    mask = torch.zeros(layout.modality.shape, dtype=torch.bool)
    for row in range(len(conversations)):
        mask[row, layout.tokens_in(Box(*cases[row // 2].target.box), row=row)] = True
    steered = steer(model, sae, {feature: Set(STRENGTH * scale)}, tokens=mask, steps="prefill")
    return steered.answer(conversations, max_new_tokens=ANSWER_TOKENS, batch_size=len(conversations))
