"""Average precision of every feature for every concept, from sparse activations, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int8, Int64

PRESENT, ABSENT, UNSURE = 1, 0, -1
"""Whether a token shows a concept; unsure tokens count neither way."""
_PAIRS = 1 << 22
"""So many (activation, concept) pairs are looked at at a time: some 200 MiB."""


class Firings(NamedTuple):
    """Every activation above zero on some tokens."""

    token: Int64[np.ndarray, " n"]
    feature: Int64[np.ndarray, " n"]
    value: Float32[np.ndarray, " n"]

    @classmethod
    def joined(cls, parts: Sequence[Firings]) -> Firings:
        """Put parts behind one another."""
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def among(self, tokens: np.ndarray) -> Firings:
        """Keep those on some tokens (a mask), which are numbered anew in their order."""
        numbers = np.cumsum(tokens) - 1
        kept = tokens[self.token]
        return Firings(numbers[self.token[kept]], self.feature[kept], self.value[kept])


def prevalence_of(labels: Int8[np.ndarray, "tokens concepts"]) -> Float64[np.ndarray, " concepts"]:
    """Share of the tokens that show each concept, unsure ones left out: the average precision of chance."""
    known = np.maximum((labels != UNSURE).sum(axis=0), 1)
    return np.asarray((labels == PRESENT).sum(axis=0) / known, dtype=np.float64)


def above_chance(
    precision: Float64[np.ndarray, "*shape"], prevalence: Float64[np.ndarray, "*shape"]
) -> Float64[np.ndarray, "*shape"]:
    """Average precision with chance at 0 and perfection at 1; where everything shows a concept there is nothing to fit.

    >>> above_chance(np.array([0.6, 1.0]), np.array([0.6, 0.2])).tolist()
    [0.0, 1.0]
    """
    room = 1 - np.asarray(prevalence, dtype=np.float64)
    gained = np.asarray(precision, dtype=np.float64) - prevalence
    return np.asarray(np.divide(gained, room, out=np.zeros(np.broadcast(gained, room).shape), where=room > 0))


def concept_precisions(
    firings: Firings, labels: Int8[np.ndarray, "tokens concepts"], *, n_features: int
) -> Float64[np.ndarray, "features concepts"]:
    """Return the average precision of every feature for every concept.

    AP = sum over k of (recall_k - recall_{k-1}) * precision_k over tokens by falling activation, equal ones together
    and all silent tokens tied at the end, as scikit-learn's `average_precision_score` defines it. UNSURE tokens are
    left out. Time and memory go with the activations on tokens that show something, not with features times concepts.

    Args:
        firings: the activations above zero.
        labels: PRESENT, ABSENT or UNSURE.
        n_features: width of the SAE.

    Returns:
        NaN where a concept does not occur.
    """
    n_concepts = labels.shape[1]
    n_positive = (labels == PRESENT).sum(axis=0)
    prevalence = prevalence_of(labels)
    order = np.lexsort((-firings.value, firings.feature))
    feature, token, value = firings.feature[order], firings.token[order], firings.value[order]
    starts = np.searchsorted(feature, np.arange(n_features + 1))
    table = _LabelTable.of(labels)
    gained = np.zeros((n_features, n_concepts))
    hits = np.zeros((n_features, n_concepts))
    pairs = np.concatenate([[0], np.cumsum(table.counts[token])])
    first = 0
    while first < n_features:
        # As many whole features as fit, at least one.
        last = int(np.searchsorted(pairs[starts], pairs[starts[first]] + _PAIRS, side="right")) - 1
        last = min(max(last, first + 1), n_features)
        part = slice(starts[first], starts[last])
        _gain(feature[part] - first, token[part], value[part], table, gained[first:last], hits[first:last])
        first = last
    result = gained + (n_positive - hits) * prevalence
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(n_positive > 0, result / n_positive, np.nan)


class _LabelTable(NamedTuple):
    """The concepts of each token that are present or unsure, one after another."""

    starts: np.ndarray
    counts: np.ndarray
    concept: np.ndarray
    present: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray) -> _LabelTable:
        token, concept = labels.nonzero()
        counts = np.bincount(token, minlength=len(labels))
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(labels) else np.zeros(0, dtype=np.int64)
        return cls(starts, counts, concept, labels[token, concept] == PRESENT)


def _gain(
    feature: np.ndarray,
    token: np.ndarray,
    value: np.ndarray,
    table: _LabelTable,
    gained: np.ndarray,
    hits: np.ndarray,
) -> None:
    """Add up precision at every hit, and count hits, of activations ordered by feature and falling value."""
    if not len(feature):
        return
    rank, end = _ranks(feature, value)
    counts = table.counts[token]
    firing = np.repeat(np.arange(len(token)), counts)
    offset = np.arange(len(firing)) - np.repeat(np.cumsum(counts) - counts, counts)
    entry = table.starts[token[firing]] + offset
    cell = feature[firing] * gained.shape[1] + table.concept[entry]
    # Stable, so that within a feature and concept activations still fall.
    order = np.argsort(cell, kind="stable")
    cell, firing, present = cell[order], firing[order], table.present[entry][order]
    if not len(cell):
        return
    new_cell = np.concatenate([[True], cell[1:] != cell[:-1]])
    n_present = _running(present, new_cell)
    n_unsure = _running(~present, new_cell)
    # Equal activations share the precision at the last of them.
    tie = end[firing]
    closes = np.concatenate([(cell[1:] != cell[:-1]) | (tie[1:] != tie[:-1]), [True]])
    last = np.flatnonzero(closes)[np.searchsorted(np.flatnonzero(closes), np.arange(len(cell)))]
    seen = rank[tie] + 1 - n_unsure[last]
    at = cell[present]
    precision = (n_present[last] / np.maximum(seen, 1))[present]
    gained.reshape(-1)[:] += np.bincount(at, weights=precision, minlength=gained.size)
    hits.reshape(-1)[:] += np.bincount(at, minlength=hits.size)


def _ranks(feature: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of each activation within its feature, and the last activation that equals it."""
    index = np.arange(len(feature))
    new = np.concatenate([[True], feature[1:] != feature[:-1]])
    rank = index - np.maximum.accumulate(np.where(new, index, 0))
    changes = np.concatenate([(feature[1:] != feature[:-1]) | (value[1:] != value[:-1]), [True]])
    closing = np.flatnonzero(changes)
    return rank, closing[np.searchsorted(closing, index)]


def _running(flags: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Count flags up to and including each place, from the last new beginning on."""
    total = np.cumsum(flags)
    before = np.where(new, total - flags, 0)
    return total - np.maximum.accumulate(before)
