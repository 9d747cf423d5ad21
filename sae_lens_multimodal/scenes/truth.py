"""What every SAE feature really responds to: its activations against the scenes' masks and naming words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sae_lens_multimodal.data.batches import encoded_batches
from sae_lens_multimodal.data.stream import read_prompts
from sae_lens_multimodal.features.precision import (
    ABSENT,
    PRESENT,
    UNSURE,
    Firings,
    above_chance,
    concept_precisions,
    prevalence_of,
)
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.saes import check_sae, encode_chunks
from sae_lens_multimodal.scenes.concepts import (
    ALL_CONCEPTS,
    ATTRIBUTE_KINDS,
    CONCEPTS,
    COVERED_SHARE,
    TOUCHED_SHARE,
    WORD,
    Concept,
    mask_share,
    token_labels,
)
from sae_lens_multimodal.scenes.world import make_scene
from sae_lens_multimodal.types import Modality

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sae_lens_multimodal.adapters.model import VisionLanguageModel
    from sae_lens_multimodal.data.batches import PromptBatch

__all__ = [
    "ABSENT",
    "ALL_CONCEPTS",
    "CLEAR_PRECISION",
    "CONCEPTS",
    "COVERED_SHARE",
    "MODALITIES",
    "PRESENT",
    "TOUCHED_SHARE",
    "UNSURE",
    "Concept",
    "FeatureTruth",
    "Firings",
    "Truth",
    "concept_precisions",
    "fit_features",
    "fit_several",
    "mask_share",
    "token_labels",
]

CLEAR_PRECISION = 0.5
"""A feature is clear where its best concept has at least this average precision, and as much above chance."""
MIN_TOKENS = 10
"""A concept must be on so many tokens to be what a feature stands for: of one token alone, some feature is the best."""
MODALITIES = (Modality.IMAGE, Modality.TEXT)


@dataclass(frozen=True, kw_only=True)
class FeatureTruth:
    """The concept that a feature fits best."""

    feature: int
    concept: Concept
    modality: Modality
    """Where it fits best: on the objects in the picture, or on the words that name them."""
    average_precision: float
    n_active: int
    """Tokens of that modality on which the feature fires."""
    by_modality: dict[Modality, tuple[Concept, float]]
    """The best concept and its average precision, for image and text tokens apart."""
    above_chance: float = 1.0
    """The average precision with chance at 0, on the worse of two halves of the prompts."""

    @property
    def is_clear(self) -> bool:
        """Whether the fit is good enough to speak of the feature's meaning.

        It must be as far above chance, as every feature has a high average precision for what is nearly everywhere;
        and that on each half of the prompts, as some feature fits what is rare on any one set of prompts.
        """
        return min(self.average_precision, self.above_chance) >= CLEAR_PRECISION


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What all features of an SAE respond to."""

    features: list[FeatureTruth]
    """Every feature that fires at all, in order."""
    precisions: dict[Modality, NDArray[np.float64]]
    """Average precision, float [features, concepts], for image and text tokens apart."""
    concepts: tuple[Concept, ...] = CONCEPTS
    """The columns."""
    halves: dict[Modality, tuple[NDArray[np.float64], NDArray[np.float64]]] = field(default_factory=dict)
    """The same on two random halves of the prompts, so that what is chosen on one can be measured on the other."""
    tokens: dict[Modality, _Tokens] = field(default_factory=dict, repr=False)
    """What all tokens show, and what fires on them."""

    def best_by_value(self, modality: Modality, kind: str) -> dict[str, float]:
        """Return for every value of a kind the average precision of the feature that fits it best."""
        matrix = np.nan_to_num(self.precisions[modality])
        return {self.concepts[column].value: float(matrix[:, column].max()) for column in self.columns(kind)}

    def best_by_value_elsewhere(self, modality: Modality, kind: str) -> dict[str, float]:
        """As `best_by_value`, but measured on prompts that the feature was not chosen on.

        The feature is chosen on one half of the prompts and measured on the other, both ways; the mean of the two.
        Values that do not occur in both halves are left out.
        """
        one, other = self.halves[modality]
        found = {}
        for column in self.columns(kind):
            if np.isnan(one[0, column]) or np.isnan(other[0, column]):
                continue
            there, back = other[one[:, column].argmax(), column], one[other[:, column].argmax(), column]
            found[self.concepts[column].value] = float(there + back) / 2
        return found

    def columns(self, kind: str) -> list[int]:
        """The columns of the concepts of a kind."""
        return [column for column, concept in enumerate(self.concepts) if concept.kind == kind]

    def only_attributes(self) -> Truth:
        """The same with single attributes as the only concepts."""
        return self._only([concept.kind in ATTRIBUTE_KINDS for concept in self.concepts])

    def without_words(self) -> Truth:
        """The same without words that name no attribute."""
        return self._only([concept.kind != WORD for concept in self.concepts])

    def _only(self, chosen: Sequence[bool]) -> Truth:
        kept = np.flatnonzero(chosen).tolist()
        fits = {modality: matrix[:, kept] for modality, matrix in self.precisions.items()}
        halves = {modality: (one[:, kept], two[:, kept]) for modality, (one, two) in self.halves.items()}
        tokens = {modality: one.only(kept) for modality, one in self.tokens.items()}
        concepts = tuple(self.concepts[column] for column in kept)
        return _truth(concepts, fits, halves, tokens)


@dataclass(frozen=True)
class _Tokens:
    """All tokens of one modality."""

    labels: NDArray[np.int8]
    """[tokens, concepts]."""
    is_second: NDArray[np.bool_]
    """Whether a token's prompt is in the second half."""
    firings: Firings

    def only(self, columns: Sequence[int]) -> _Tokens:
        return _Tokens(self.labels[:, columns], self.is_second, self.firings)

    def n_active(self, n_features: int) -> NDArray[np.int64]:
        """On how many tokens each feature fires."""
        return np.bincount(self.firings.feature, minlength=n_features)


def fit_features(
    model: VisionLanguageModel,
    sae: Any,  # noqa: ANN401 - any SAE-Lens SAE
    rows: Iterable[dict[str, Any]],
    *,
    hook_name: str | None = None,
    batch_size: int = 16,
    concepts: Sequence[Concept] = CONCEPTS,
) -> Truth:
    """Find for every live feature the concept that its activation map fits best.

    Image tokens are compared with the objects' pixel masks, text tokens with the words that name an attribute.

    Args:
        model: the model that the SAE reads.
        sae: an SAE-Lens SAE.
        rows: rows of `scene_rows`; their `scene_seeds` bring back the scenes.
        hook_name: where the SAE reads; by default what its metadata say.
        batch_size: prompts a forward pass.
        concepts: what to compare with: the single attributes (CONCEPTS), or ALL_CONCEPTS.

    Returns:
        The best concept of every feature that fires at all, and the whole table.
    """
    saes = {"sae": sae}
    return fit_several(model, saes, rows, hook_name=hook_name, batch_size=batch_size, concepts=concepts)["sae"]


@torch.no_grad()
def fit_several(
    model: VisionLanguageModel,
    saes: Mapping[str, Any],
    rows: Iterable[dict[str, Any]],
    *,
    hook_name: str | None = None,
    batch_size: int = 16,
    concepts: Sequence[Concept] = ALL_CONCEPTS,
) -> dict[str, Truth]:
    """Do `fit_features` for several SAEs of one hook, such as an SAE and its floors, in one pass over the scenes."""
    hooks = {check_sae(model, sae, hook_name) for sae in saes.values()}
    if len(hooks) != 1:
        raise ValueError(f"got SAEs of the hooks {', '.join(sorted(hooks))}; expected SAEs of one hook.")
    (hook,) = hooks
    labels: dict[Modality, list[NDArray[np.int8]]] = {modality: [] for modality in MODALITIES}
    later: dict[Modality, list[NDArray[np.bool_]]] = {modality: [] for modality in MODALITIES}
    firings: dict[tuple[str, Modality], list[Firings]] = {(name, one): [] for name in saes for one in MODALITIES}
    n_tokens = dict.fromkeys(MODALITIES, 0)
    for group in encoded_batches(model, read_prompts(list(rows)), batch_size=batch_size):
        activations = read_activations(model, group.batch, hook)[hook]
        truth = _labels_of(model, group, concepts)
        second = np.repeat([_in_second_half(prompt.row) for prompt in group.prompts], group.batch.layout.n_tokens)
        for modality in MODALITIES:
            chosen = group.batch.layout.modality == modality
            flat = chosen.reshape(-1).numpy()
            labels[modality].append(truth[flat])
            later[modality].append(second[flat])
            for name, sae in saes.items():
                values = activations[chosen.to(activations.device)].flatten(1)
                firings[name, modality].append(_firings(sae, values, n_tokens[modality]))
            n_tokens[modality] += int(flat.sum())
    found = {}
    for name, sae in saes.items():
        tokens = {
            one: _Tokens(np.concatenate(labels[one]), np.concatenate(later[one]), Firings.joined(firings[name, one]))
            for one in MODALITIES
        }
        found[name] = _measured(tokens, tuple(concepts), sae.cfg.d_sae)
    return found


def _in_second_half(row: int) -> bool:
    """Toss a coin for a prompt; rows of different kinds take turns, so their parity would not do."""
    return bool(np.random.default_rng(row).random() < 0.5)


def _labels_of(model: VisionLanguageModel, group: PromptBatch, concepts: Sequence[Concept]) -> NDArray[np.int8]:
    """Label all positions of a batch, row by row: int8 [batch * seq, concepts]."""
    parts = []
    for row, prompt in enumerate(group.prompts):
        scenes = [make_scene(seed) for seed in prompt.extras.get("scene_seeds", ())]
        words = model.token_strings(group.batch["input_ids"][row])
        parts.append(token_labels(scenes, group.batch.layout.row(row), words, concepts))
    return np.concatenate(parts)


def _firings(sae: Any, activations: torch.Tensor, first: int) -> Firings:  # noqa: ANN401 - any SAE-Lens SAE
    parts = [Firings(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    for chunk, dense in encode_chunks(sae, activations):
        token, feature = (dense > 0).nonzero(as_tuple=True)
        value = dense[token, feature].float().cpu().numpy()
        parts.append(Firings(token.cpu().numpy() + chunk.start + first, feature.cpu().numpy(), value))
    return Firings.joined(parts)


def _measured(tokens: dict[Modality, _Tokens], concepts: tuple[Concept, ...], n_features: int) -> Truth:
    fits, halves = {}, {}
    for modality, one in tokens.items():
        fits[modality] = concept_precisions(one.firings, one.labels, n_features=n_features)
        first, second = (
            concept_precisions(one.firings.among(mask), one.labels[mask], n_features=n_features)
            for mask in (~one.is_second, one.is_second)
        )
        halves[modality] = (first, second)
    return _truth(concepts, fits, halves, tokens)


def _truth(
    concepts: tuple[Concept, ...],
    fits: dict[Modality, NDArray[np.float64]],
    halves: dict[Modality, tuple[NDArray[np.float64], NDArray[np.float64]]],
    tokens: dict[Modality, _Tokens],
) -> Truth:
    features = _best_fits(concepts, fits, halves, tokens)
    return Truth(features=features, precisions=fits, concepts=concepts, halves=halves, tokens=tokens)


def _best_fits(
    concepts: tuple[Concept, ...],
    fits: dict[Modality, NDArray[np.float64]],
    halves: dict[Modality, tuple[NDArray[np.float64], NDArray[np.float64]]],
    tokens: dict[Modality, _Tokens],
) -> list[FeatureTruth]:
    """Pick the best concept of every feature that fires: the one that it fits farthest above chance on both halves."""
    above = {one: _above_on_both(halves[one], tokens[one]) for one in MODALITIES}
    active = {modality: one.n_active(len(fits[modality])) for modality, one in tokens.items()}
    found = []
    for feature in np.flatnonzero(sum(active.values())):
        best = {modality: int(above[modality][feature].argmax()) for modality in MODALITIES}
        by_modality = {
            modality: (concepts[column], float(np.nan_to_num(fits[modality][feature, column])))
            for modality, column in best.items()
        }
        fires = [modality for modality in MODALITIES if active[modality][feature]]
        where = max(fires, key=lambda modality: above[modality][feature, best[modality]])
        concept, precision = by_modality[where]
        found.append(
            FeatureTruth(
                feature=int(feature),
                concept=concept,
                modality=where,
                average_precision=precision,
                n_active=int(active[where][feature]),
                by_modality=by_modality,
                above_chance=float(above[where][feature, best[where]]),
            )
        )
    return found


def _above_on_both(halves: tuple[NDArray[np.float64], NDArray[np.float64]], tokens: _Tokens) -> NDArray[np.float64]:
    """How far above chance each feature fits each concept on the worse half; -1 for concepts that are too rare."""
    parts = [
        above_chance(precision, prevalence_of(tokens.labels[mask]))
        for precision, mask in zip(halves, (~tokens.is_second, tokens.is_second), strict=True)
    ]
    rare = (tokens.labels == PRESENT).sum(axis=0) < MIN_TOKENS
    return np.where(rare, -1.0, np.nan_to_num(np.minimum(*parts), nan=-1.0))
