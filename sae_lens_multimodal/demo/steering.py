"""Does exchanging features on an object make the model see another attribute there, and nothing else?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sae_lens import SAE

from sae_lens_multimodal.hooks.changes import Ablate, Change, Set
from sae_lens_multimodal.hooks.steer import steer
from sae_lens_multimodal.report.records import SteeringRecord
from sae_lens_multimodal.scenes.questions import LIST_QUESTION
from sae_lens_multimodal.scenes.truth import CLEAR_PRECISION, Concept, Truth
from sae_lens_multimodal.scenes.words import phrase_of
from sae_lens_multimodal.scenes.world import Scene, SceneObject, make_scene
from sae_lens_multimodal.types import Box, Modality

if TYPE_CHECKING:
    from sae_lens_multimodal.adapters.model import VisionLanguageModel
    from sae_lens_multimodal.features.store import FeatureStore

STEERED_KINDS = ("colour", "shape")
STRENGTH = 1.5
"""Steered activation as a multiple of the feature's own 99th percentile on image tokens."""
RECORDS_SHOWN = 4
ANSWER_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scene of two objects, and what the list of its objects becomes if one attribute of the first is exchanged."""

    scene: Scene
    own: Concept
    """The first object's attribute of the steered kind."""
    wanted: str
    """The first object's phrase with the steered attribute in place of its own."""

    @property
    def target(self) -> SceneObject:
        """The object that is steered."""
        return self.scene.objects[0]

    @property
    def other(self) -> SceneObject:
        """The object that is to be left alone."""
        return self.scene.objects[1]


@dataclass
class SteeringResult:
    """What became of the lists of objects."""

    n_features: int = 0
    n_cases: int = 0
    n_steered: int = 0
    """Lists in which the target has the steered attribute, and else its own."""
    n_control: int = 0
    """The same with a random other feature in the steered one's place, set to the same activation."""
    n_named: int = 0
    """Lists that named the other object rightly before."""
    n_others_kept: int = 0
    """Of these, lists that still do when the target is steered."""
    records: dict[int, list[SteeringRecord]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return counts and shares; None where there is nothing to share."""
        return {
            "features": self.n_features,
            "cases": self.n_cases,
            "success": _share(self.n_steered, self.n_cases),
            "random_feature": _share(self.n_control, self.n_cases),
            "others_kept": _share(self.n_others_kept, self.n_named),
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
    """Give one object of unseen scenes another colour or shape, feature by feature, and ask what is in the picture.

    On the object's patches the clearest feature of the attribute is set to a high value, and the clearest feature of
    the attribute that the object has is ablated.
    """
    rng = np.random.default_rng(seed)
    chosen = best_features(truth)
    others = [fit.feature for fit in truth.features if fit.feature not in set(chosen.values())]
    result = SteeringResult(n_features=len(chosen))
    for number, (concept, feature) in enumerate(chosen.items()):
        cases = list(islice(draw_cases(concept, first_seed=(seed + 1) * 10_000_000 + 10_000 * number), n_scenes))
        strength = STRENGTH * store.scale(feature, "image")
        before = _answers(model, cases)
        after = _steered_answers(model, sae, feature, strength, chosen, cases)
        count_answers(result, cases, before, after)
        if others:
            control = _steered_answers(model, sae, int(rng.choice(others)), strength, chosen, cases)
            result.n_control += sum(
                case.wanted in _phrases(answer) for case, answer in zip(cases, control, strict=True)
            )
        edit = f"{concept.value}: set to {strength:.3g} on the object's patches, its own {concept.kind} ablated"
        result.records[feature] = [
            SteeringRecord(prompt=LIST_QUESTION, before=old, after=new, edit=edit, image=case.scene.image)
            for case, old, new in islice(zip(cases, before, after, strict=True), RECORDS_SHOWN)
        ]
    return result


def count_answers(result: SteeringResult, cases: Sequence[Case], before: Sequence[str], after: Sequence[str]) -> None:
    """Add the answers of one steered feature to the counts."""
    for case, old, new in zip(cases, before, after, strict=True):
        named = case.other.phrase in _phrases(old)
        result.n_cases += 1
        result.n_steered += case.wanted in _phrases(new)
        result.n_named += named
        result.n_others_kept += named and case.other.phrase in _phrases(new)


def best_features(truth: Truth) -> dict[Concept, int]:
    """Return for every colour and shape the feature that fits it best on image tokens, if one is clear."""
    best: dict[Concept, tuple[float, int]] = {}
    for fit in truth.features:
        concept, precision = fit.by_modality[Modality.IMAGE]
        if concept.kind in STEERED_KINDS and precision >= max(CLEAR_PRECISION, best.get(concept, (0.0, 0))[0]):
            best[concept] = (precision, fit.feature)
    return {concept: feature for concept, (_, feature) in sorted(best.items())}


def draw_cases(concept: Concept, *, first_seed: int) -> Iterator[Case]:
    """Draw scenes of two objects, neither of which has the attribute."""
    for seed in count(first_seed):
        scene = make_scene(seed, n_objects=2)
        first, second = scene.objects
        if concept.value not in (first.attributes[concept.kind], second.attributes[concept.kind]):
            seen = {kind: first.attributes[kind] for kind in ("colour", "texture", "shape")}
            yield Case(
                scene=scene,
                own=Concept(concept.kind, first.attributes[concept.kind]),
                wanted=phrase_of({**seen, concept.kind: concept.value}),
            )


def _conversations(cases: Sequence[Case]) -> list[list[dict[str, Any]]]:
    question = {"type": "text", "text": LIST_QUESTION}
    return [[{"role": "user", "content": [{"type": "image", "image": case.scene.image}, question]}] for case in cases]


def _answers(model: VisionLanguageModel, cases: Sequence[Case]) -> list[str]:
    return model.answer(_conversations(cases), max_new_tokens=ANSWER_TOKENS, batch_size=len(cases))


def _steered_answers(
    model: VisionLanguageModel,
    sae: SAE[Any],
    feature: int,
    strength: float,
    chosen: dict[Concept, int],
    cases: Sequence[Case],
) -> list[str]:
    """Ask about every case with the feature set, and the feature of the target's own attribute ablated."""
    answers = [""] * len(cases)
    for own in sorted({case.own for case in cases}):
        rows = [row for row, case in enumerate(cases) if case.own == own]
        some = [cases[row] for row in rows]
        changes: dict[int, Change] = {feature: Set(strength)}
        if own in chosen and chosen[own] != feature:
            changes[chosen[own]] = Ablate()
        steered = steer(model, sae, changes, tokens=_on_targets(model, some), steps="prefill")
        for row, answer in zip(rows, _answers(steered, some), strict=True):
            answers[row] = answer
    return answers


def _on_targets(model: VisionLanguageModel, cases: Sequence[Case]) -> torch.Tensor:
    """Mark the patches that lie on each case's target: bool [cases, seq]."""
    layout = model.encode(_conversations(cases)).layout
    mask = torch.zeros(layout.modality.shape, dtype=torch.bool)
    for row, case in enumerate(cases):
        mask[row, layout.tokens_in(Box(*case.target.box), row=row)] = True
    return mask


def _phrases(answer: str) -> list[str]:
    return [phrase.strip() for phrase in answer.split(",")]


def _share(number: int, total: int) -> float | None:
    return number / total if total else None
