"""What every SAE feature really responds to: its activations against the scenes' masks and naming words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sae_lens_multimodal.data.batches import encoded_batches
from sae_lens_multimodal.data.stream import read_prompts
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.saes import check_sae, encode_tokens
from sae_lens_multimodal.scenes.words import ATTRIBUTES, attribute_of
from sae_lens_multimodal.scenes.world import Scene, make_scene
from sae_lens_multimodal.types import Modality

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sae_lens_multimodal.adapters.layout import TokenLayout
    from sae_lens_multimodal.adapters.model import VisionLanguageModel

PRESENT, ABSENT, UNSURE = 1, 0, -1
COVERED_SHARE = 0.5
"""A patch shows an attribute where objects that have it cover at least this share of it."""
TOUCHED_SHARE = 0.1
"""Between this share and COVERED_SHARE a patch counts neither way."""
CLEAR_PRECISION = 0.5
"""A feature is clear where its best attribute has at least this average precision."""
MODALITIES = (Modality.IMAGE, Modality.TEXT)


class Concept(NamedTuple):
    """One value of one kind of attribute, such as colour red."""

    kind: str
    value: str


CONCEPTS: tuple[Concept, ...] = tuple(Concept(kind, value) for kind, values in ATTRIBUTES.items() for value in values)


@dataclass(frozen=True, kw_only=True)
class FeatureTruth:
    """The attribute that a feature fits best."""

    feature: int
    concept: Concept
    modality: Modality
    """Where it fits best: on the objects in the picture, or on the words that name them."""
    average_precision: float
    n_active: int
    """Tokens of that modality on which the feature fires."""
    by_modality: dict[Modality, tuple[Concept, float]]
    """The best concept and its average precision, for image and text tokens apart."""

    @property
    def is_clear(self) -> bool:
        """Whether the fit is good enough to speak of the feature's meaning."""
        return self.average_precision >= CLEAR_PRECISION


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What all features of an SAE respond to."""

    features: list[FeatureTruth]
    """Every feature that fires at all, in order."""
    precisions: dict[Modality, NDArray[np.float64]]
    """Average precision, float [features, concepts], for image and text tokens apart."""

    def best_by_value(self, modality: Modality, kind: str) -> dict[str, float]:
        """Return for every value of a kind the average precision of the feature that fits it best."""
        columns = {concept.value: column for column, concept in enumerate(CONCEPTS) if concept.kind == kind}
        matrix = np.nan_to_num(self.precisions[modality])
        return {value: float(matrix[:, column].max()) for value, column in columns.items()}


class Firings(NamedTuple):
    """Every non-zero activation on the tokens of one modality."""

    token: NDArray[np.int64]
    feature: NDArray[np.int64]
    value: NDArray[np.float32]


@torch.no_grad()
def fit_features(
    model: VisionLanguageModel,
    sae: Any,  # noqa: ANN401 - any SAE-Lens SAE
    rows: Iterable[dict[str, Any]],
    *,
    hook_name: str | None = None,
    batch_size: int = 16,
) -> Truth:
    """Find for every live feature the attribute that its activation map fits best.

    Image tokens are compared with the objects' pixel masks, text tokens with the words that name an attribute.

    Args:
        model: the model that the SAE reads.
        sae: an SAE-Lens SAE.
        rows: rows of `scene_rows`; their `scene_seeds` bring back the scenes.
        hook_name: where the SAE reads; by default what its metadata say.
        batch_size: prompts a forward pass.

    Returns:
        The best attribute of every feature that fires at all, and the whole table.
    """
    hook = check_sae(model, sae, hook_name)
    labels: dict[Modality, list[NDArray[np.int8]]] = {modality: [] for modality in MODALITIES}
    firings: dict[Modality, list[Firings]] = {modality: [] for modality in MODALITIES}
    n_tokens = dict.fromkeys(MODALITIES, 0)
    for group in encoded_batches(model, read_prompts(list(rows)), batch_size=batch_size):
        batch, prompts = group.batch, group.prompts
        activations = read_activations(model, batch, hook)[hook]
        for row, prompt in enumerate(prompts):
            layout = batch.layout.row(row)
            scenes = [make_scene(seed) for seed in prompt.extras.get("scene_seeds", ())]
            words = model.token_strings(batch["input_ids"][row])
            truth = token_labels(scenes, layout, words)
            for modality in MODALITIES:
                chosen = (layout.modality[0] == modality).nonzero()[:, 0]
                values = encode_tokens(sae, activations[row, chosen]).cpu().numpy()
                token, feature = values.nonzero()
                firings[modality].append(Firings(token + n_tokens[modality], feature, values[token, feature]))
                labels[modality].append(truth[chosen.cpu().numpy()])
                n_tokens[modality] += len(chosen)
    fits = {
        modality: concept_precisions(
            _joined(firings[modality]), np.concatenate(labels[modality]), n_features=sae.cfg.d_sae
        )
        for modality in MODALITIES
    }
    active = {modality: _active_counts(firings[modality], sae.cfg.d_sae) for modality in MODALITIES}
    return Truth(features=_best_fits(fits, active), precisions=fits)


def token_labels(scenes: Sequence[Scene], layout: TokenLayout, words: Sequence[str]) -> NDArray[np.int8]:
    """Say for every token of one prompt and every concept whether it is there.

    Args:
        scenes: the prompt's pictures, in order.
        layout: the layout of the prompt (one row).
        words: the prompt's tokens as text.

    Returns:
        int8 [seq, concepts]: PRESENT, ABSENT or UNSURE, in the order of CONCEPTS.

    Raises:
        ValueError: the pictures are not the scenes.
    """
    sizes = tuple(scene.image.size for scene in scenes)
    if sizes != layout.image_sizes[0]:
        raise ValueError(
            f"the prompt's pictures have sizes {layout.image_sizes[0]}, its scenes {sizes}: a picture is not the scene "
            "that it was cut from; use rows of the kinds 'scene' and 'text'."
        )
    labels = np.full((len(words), len(CONCEPTS)), ABSENT, dtype=np.int8)
    modality = layout.modality[0].cpu().numpy()
    for position in np.flatnonzero(modality == Modality.TEXT).tolist():
        named = attribute_of(words[position])
        if named is not None:
            labels[position, CONCEPTS.index(Concept(*named))] = PRESENT
    boxes = layout.boxes[0].cpu().numpy()
    image_index = layout.image_index[0].cpu().numpy()
    for index, scene in enumerate(scenes):
        tokens = np.flatnonzero((modality == Modality.IMAGE) & (image_index == index))
        for column, concept in enumerate(CONCEPTS):
            share = mask_share(_concept_mask(scene, concept), boxes[tokens])
            labels[tokens, column] = np.where(
                share >= COVERED_SHARE, PRESENT, np.where(share > TOUCHED_SHARE, UNSURE, ABSENT)
            )
        # patches that see nothing but padding have an empty box
        empty = (boxes[tokens, 2:] <= boxes[tokens, :2]).any(axis=1)
        labels[tokens[empty]] = UNSURE
    return labels


def mask_share(mask: NDArray[np.bool_], boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return which share of every box a mask covers, to the nearest pixel.

    Args:
        mask: bool [height, width].
        boxes: float [n, 4], x0, y0, x1, y1 in pixels.

    Returns:
        float [n] from 0 to 1.

    Example:
        >>> mask_share(np.array([[True, False], [True, False]]), np.array([[0, 0, 2, 2], [0, 0, 1, 2]], np.float32))
        array([0.5, 1. ])
    """
    height, width = mask.shape
    total = np.zeros((height + 1, width + 1))
    total[1:, 1:] = mask.cumsum(axis=0).cumsum(axis=1)
    x0, y0, x1, y1 = np.rint(boxes).astype(np.int64).T
    x0, y0 = np.clip(x0, 0, width - 1), np.clip(y0, 0, height - 1)
    x1, y1 = np.clip(np.maximum(x1, x0 + 1), 1, width), np.clip(np.maximum(y1, y0 + 1), 1, height)
    inside = total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]
    return np.asarray(inside / ((x1 - x0) * (y1 - y0)))


def concept_precisions(firings: Firings, labels: NDArray[np.int8], *, n_features: int) -> NDArray[np.float64]:
    """Return the average precision of every feature for every concept.

    AP = sum over k of (recall_k - recall_{k-1}) * precision_k over tokens by falling activation, all silent tokens
    tied at the end, as scikit-learn's `average_precision_score` defines it. UNSURE tokens are left out.

    Args:
        firings: the non-zero activations.
        labels: int8 [tokens, concepts].
        n_features: width of the SAE.

    Returns:
        float [features, concepts]; NaN where a concept does not occur.
    """
    n_positive = (labels == PRESENT).sum(axis=0)
    prevalence = n_positive / np.maximum((labels != UNSURE).sum(axis=0), 1)
    order = np.lexsort((-firings.value, firings.feature))
    feature, token = firings.feature[order], firings.token[order]
    starts = np.searchsorted(feature, np.arange(n_features + 1))
    result = np.empty((n_features, labels.shape[1]))
    for index in range(n_features):
        ranked = labels[token[starts[index] : starts[index + 1]]]
        hits = ranked == PRESENT
        n_seen = np.maximum((ranked != UNSURE).cumsum(axis=0), 1)
        gained = (hits * (hits.cumsum(axis=0) / n_seen)).sum(axis=0)
        result[index] = gained + (n_positive - hits.sum(axis=0)) * prevalence
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(n_positive > 0, result / n_positive, np.nan)


def _concept_mask(scene: Scene, concept: Concept) -> NDArray[np.bool_]:
    """Return the pixels of all objects that have the attribute."""
    mask = np.zeros((scene.image.height, scene.image.width), dtype=bool)
    for thing in scene.objects:
        if thing.attributes.get(concept.kind) == concept.value:
            mask |= thing.mask
    return mask


def _joined(parts: Sequence[Firings]) -> Firings:
    """Put the firings of all prompts behind one another."""
    return Firings(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _active_counts(parts: Sequence[Firings], n_features: int) -> NDArray[np.int64]:
    """Count on how many tokens each feature fires."""
    return np.bincount(_joined(parts).feature, minlength=n_features)


def _best_fits(
    fits: dict[Modality, NDArray[np.float64]], active: dict[Modality, NDArray[np.int64]]
) -> list[FeatureTruth]:
    """Pick the best concept of every feature that fires."""
    found = []
    for feature in np.flatnonzero(sum(active.values())):
        by_modality: dict[Modality, tuple[Concept, float]] = {}
        for modality in MODALITIES:
            row = np.nan_to_num(fits[modality][feature])
            best = int(row.argmax())
            by_modality[modality] = (CONCEPTS[best], float(row[best]))
        where = max(by_modality, key=lambda modality: by_modality[modality][1] * bool(active[modality][feature]))
        concept, precision = by_modality[where]
        found.append(
            FeatureTruth(
                feature=int(feature),
                concept=concept,
                modality=where,
                average_precision=precision,
                n_active=int(active[where][feature]),
                by_modality=by_modality,
            )
        )
    return found
