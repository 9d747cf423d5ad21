"""Cross-modal features: those that fire on what a picture shows and on the words for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest

import numpy as np
from jaxtyping import Float64

from sae_lens_multimodal.features.example import Example
from sae_lens_multimodal.features.precision import above_chance
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.types import Modality

MIN_FIT = 0.5
"""A feature is cross-modal where its average precision is so far above chance on both sides."""


@dataclass(frozen=True, kw_only=True)
class CrossModalFit:
    """A feature that fits one concept in pictures and in words."""

    feature: int
    concept: int
    """Column of the concept."""
    image: float
    """Average precision on image tokens, chance at 0."""
    text: float
    """Average precision on text tokens, chance at 0."""

    @property
    def fit(self) -> float:
        """The worse of the two."""
        return min(self.image, self.text)


def cross_modal_fits(
    image: Float64[np.ndarray, "features concepts"],
    text: Float64[np.ndarray, "features concepts"],
    *,
    image_chance: Float64[np.ndarray, " concepts"],
    text_chance: Float64[np.ndarray, " concepts"],
    min_fit: float = MIN_FIT,
) -> list[CrossModalFit]:
    """Find the features that fit a concept's image tokens and its words, the best first.

    Args:
        image: average precision of every feature for every concept on image tokens, as `concept_precisions` gives it.
        text: the same on text tokens.
        image_chance: share of the image tokens that show each concept.
        text_chance: share of the text tokens that name each concept.
        min_fit: how far above chance the worse side must be: 0 is chance, 1 is perfect.

    Returns:
        For each such feature the concept for which the worse of both sides is best.
    """
    seen, named = _fits(image, image_chance), _fits(text, text_chance)
    worse = np.minimum(seen, named)
    best = worse.argmax(axis=1)
    rows = np.arange(len(worse))
    found = [
        CrossModalFit(
            feature=int(row),
            concept=int(best[row]),
            image=float(seen[row, best[row]]),
            text=float(named[row, best[row]]),
        )
        for row in rows[worse[rows, best] >= min_fit]
    ]
    return sorted(found, key=lambda one: -one.fit)


def mismatched_share(
    image: Float64[np.ndarray, "features concepts"],
    text: Float64[np.ndarray, "features concepts"],
    *,
    image_chance: Float64[np.ndarray, " concepts"],
    text_chance: Float64[np.ndarray, " concepts"],
    groups: Sequence[str],
    min_fit: float = MIN_FIT,
) -> float:
    """The share of features that fit one concept's image tokens and another's words: what chance would find.

    Concepts are exchanged within their group (its kind): every concept's words stand for the next one's.
    """
    order = np.arange(len(groups))
    for group in set(groups):
        members = np.flatnonzero(np.asarray(groups) == group)
        order[members] = np.roll(members, 1)
    alone = order == np.arange(len(groups))
    exchanged, chance = text[:, order].copy(), text_chance[order]
    exchanged[:, alone] = np.nan
    fits = cross_modal_fits(image, exchanged, image_chance=image_chance, text_chance=chance, min_fit=min_fit)
    return len(fits) / max(len(image), 1)


def _fits(precision: np.ndarray, chance: np.ndarray) -> np.ndarray:
    # A concept that does not occur on one side cannot be fitted there.
    return np.nan_to_num(above_chance(precision, chance), nan=-1.0)


@dataclass(frozen=True, kw_only=True)
class CrossModalRow:
    """A feature of a store that fires on image and on text tokens, and how the two go together."""

    feature: int
    modality_score: float
    """1 is visual, 0 textual."""
    words: tuple[tuple[str, float], ...]
    """The words it fires on most, with their share of its activation on words."""
    agreement: float
    """Share of the prompts in which it fires on a picture whose text holds one of these words."""
    floor: float
    """The same share of prompts in whose pictures it is silent."""

    @property
    def lift(self) -> float:
        """How much oftener its words stand beside the pictures that it fires on."""
        return self.agreement - self.floor


def cross_modal_features(store: FeatureStore, *, min_examples: int = 4, n_words: int = 3) -> list[CrossModalRow]:
    """List the features of a store that fire on pictures and on words, those whose words go with the pictures first.

    No labels are needed: a feature for red things fires on red patches and on the word "red", and the texts beside the
    pictures that it fires on say "red" oftener than those beside others.

    Silent examples are first of all prompts in which the feature fires on no token at all, so their texts hold its
    words less often than texts at large: the lift is an upper bound, best for ranking features.

    Args:
        store: a feature store; it must have been harvested with silent examples.
        min_examples: how many examples of pictures, of words and without a picture to fire on a feature must have.
        n_words: how many words stand for what it fires on.
    """
    found = []
    for feature in store.features:
        texts = [*store.examples(feature, "top", "text"), *store.examples(feature, "ordinary", "text")]
        pictures = [*store.examples(feature, "top", "image"), *store.examples(feature, "ordinary", "image")]
        silent = [one for one in store.examples(feature, "silent", "image") if one.prompt.image_ids]
        if min(len(texts), len(pictures), len(silent)) < min_examples:
            continue
        words = _top_words(texts, n_words)
        wanted = {word for word, _ in words}
        found.append(
            CrossModalRow(
                feature=feature,
                modality_score=float(store.statistics_of(feature)["modality_score"]),
                words=words,
                agreement=_share_with(pictures, wanted),
                floor=_share_with(silent, wanted),
            )
        )
    return sorted(found, key=lambda row: -row.lift)


def _top_words(examples: Iterable[Example], count: int) -> tuple[tuple[str, float], ...]:
    weights: defaultdict[str, float] = defaultdict(float)
    for example in examples:
        is_text = example.prompt.modality[example.positions] == Modality.TEXT
        for position, value in zip(example.positions[is_text], example.values[is_text], strict=True):
            weights[_plain(example.prompt.tokens[position])] += float(value)
    weights.pop("", None)
    total = sum(weights.values()) or 1.0
    return tuple((word, weight / total) for word, weight in nlargest(count, weights.items(), key=lambda one: one[1]))


def _share_with(examples: Sequence[Example], words: set[str]) -> float:
    return sum(bool(words & _words_of(example)) for example in examples) / len(examples)


def _words_of(example: Example) -> set[str]:
    is_text = example.prompt.modality == Modality.TEXT
    return {_plain(token) for token, plain in zip(example.prompt.tokens, is_text, strict=True) if plain}


def _plain(token: str) -> str:
    return token.strip().lower()
