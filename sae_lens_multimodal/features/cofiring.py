"""Counting which features fire on one token, for pairs of features."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

_MERGE_AT = 1 << 22


class Companions(NamedTuple):
    """The features that fired on one feature's tokens, and on how many."""

    features: Int64[np.ndarray, "n"]
    counts: Int64[np.ndarray, "n"]


class PairCounts:
    """How often a feature fired on tokens sampled for another.

    Exact. Memory: 16 bytes for each pair that occurs, so at most `16 * features * tokens sampled of each * K`, with K
    features active on a token, and 32 MiB.
    """

    def __init__(self, d_sae: int) -> None:
        self._d_sae = d_sae
        self.keys = np.zeros(0, dtype=np.int64)
        """`row * d_sae + feature`, ascending."""
        self.counts = np.zeros(0, dtype=np.int64)
        self._waiting: list[np.ndarray] = []
        self._n_waiting = 0

    def add(self, rows: Int64[np.ndarray, "n"], features: Int64[np.ndarray, "n"]) -> None:
        """Count that each of `features` fired on a token that was sampled for the feature of that row."""
        self._waiting.append(rows * self._d_sae + features)
        self._n_waiting += len(rows)
        if self._n_waiting >= _MERGE_AT:
            self.merge()

    def merge(self) -> None:
        """Bring everything counted into `keys` and `counts`."""
        new, times = np.unique(np.concatenate([self.keys[:0], *self._waiting]), return_counts=True)
        self._waiting, self._n_waiting = [], 0
        keys, place = np.unique(np.concatenate([self.keys, new]), return_inverse=True)
        counts = np.zeros(len(keys), dtype=np.int64)
        np.add.at(counts, place, np.concatenate([self.counts, times]))
        self.keys, self.counts = keys, counts

    def of(self, row: int) -> Companions:
        """What fired on the tokens of one row, after `merge`."""
        start, stop = np.searchsorted(self.keys, [row * self._d_sae, (row + 1) * self._d_sae])
        return Companions(self.keys[start:stop] - row * self._d_sae, self.counts[start:stop])

    def count(self, row: int, feature: int) -> int:
        """On how many tokens of a row one feature fired, after `merge`."""
        key = row * self._d_sae + feature
        place = int(np.searchsorted(self.keys, key))
        return int(self.counts[place]) if place < len(self.keys) and self.keys[place] == key else 0
