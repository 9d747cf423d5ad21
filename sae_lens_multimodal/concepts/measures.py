"""What is measured of concepts, each a formula on tensors or words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

CLIP_WEIGHT = 2.5
"""The factor of Hessel et al. (2021)."""


class BERTScore(NamedTuple):
    """Precision, recall and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def bert_score(candidate: Float[Tensor, "m d"], reference: Float[Tensor, "n d"]) -> BERTScore:
    """Match each token with the nearest of the other text (Zhang et al. 2020, without idf weights and rescaling).

    Args:
        candidate: vectors of length 1 of one text's tokens.
        reference: of the other's.

    Example:
        >>> bert_score(torch.eye(2), torch.tensor([[1.0, 0.0]]))
        BERTScore(precision=0.5, recall=1.0, f1=0.6666666666666666)
    """
    if not len(candidate) or not len(reference):
        return BERTScore(0.0, 0.0, 0.0)
    similar = candidate @ reference.T
    precision, recall = float(similar.amax(1).mean()), float(similar.amax(0).mean())
    total = precision + recall
    return BERTScore(precision, recall, 2 * precision * recall / total if total > 0 else 0.0)


def clip_score(images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """2.5 max(cos, 0) of each picture with its text (Hessel et al. 2021); vectors of length 1.

    >>> clip_score(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.6, 0.8], [0.0, -1.0]])).tolist()
    [1.5, 0.0]
    """
    return CLIP_WEIGHT * np.maximum((images * texts).sum(axis=1), 0)


def ratio_interval(
    above: Float[np.ndarray, " n"],
    below: Float[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
    level: float = 0.95,
    n_resamples: int = 1000,
) -> tuple[float, float]:
    """Percentile bootstrap interval of Σ above / Σ below, drawing whole groups with replacement (Efron 1979).

    States of one row have one picture and one caption, so it is rows that are drawn.

    >>> ratio_interval(np.ones(4), np.full(4, 2.0), np.array([0, 0, 1, 2]))
    (0.5, 0.5)
    """
    numbers = np.unique(groups, return_inverse=True)[1]
    sums = np.stack([np.bincount(numbers, one) for one in (above, below)])
    rng = np.random.default_rng(seed)
    n = sums.shape[1]
    drawn = np.stack([sums[:, rng.integers(n, size=n)].sum(axis=1) for _ in range(n_resamples)])
    ratios = drawn[:, 0] / np.where(drawn[:, 1] > 0, drawn[:, 1], np.inf)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def explained_variance(states: Float[Tensor, "n d"], rebuilt: Float[Tensor, "n d"]) -> float:
    """Share of the states' variance about their mean that is rebuilt; below 0 where the mean alone does better.

    >>> explained_variance(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]]))
    0.5
    """
    states, rebuilt = states.double(), rebuilt.double()
    spread = (states - states.mean(0)).square().sum()
    return float(1 - (states - rebuilt).square().sum() / spread) if spread > 0 else 0.0


def overlap(words: Sequence[Sequence[str]]) -> float:
    """Mean share of words that two concepts have in common, over all pairs; a concept without words is left out.

    >>> overlap([["cat", "dog"], ["dog", "cow"], ["sun", "sea"]])
    0.16666666666666666
    """
    sets = [{word.casefold() for word in one} for one in words if one]
    pairs = [len(a & b) / min(len(a), len(b)) for a, b in combinations(sets, 2)]
    return float(np.mean(pairs)) if pairs else 0.0


def disentanglement(concepts: Float[Tensor, "k d"]) -> float:
    """1 less the mean size of the cosine of two different concepts: 1 where all are at right angles.

    >>> disentanglement(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    1.0
    """
    if len(concepts) < 2:
        return 1.0
    unit = concepts.double() / concepts.double().norm(dim=1, keepdim=True).clamp_min(1e-30)
    rows, columns = torch.triu_indices(len(concepts), len(concepts), offset=1)
    return 1 - float((unit @ unit.T).abs()[rows, columns].mean())


def coactivation(activations: Float[Tensor, "n k"]) -> float:
    """Mean size of the correlation of two different concepts' activations; concepts that never change are left out."""
    centred = activations.double() - activations.double().mean(0)
    size = centred.norm(dim=0)
    moving = centred[:, size > 1e-12 * size.max().clamp_min(1e-30)]
    if moving.shape[1] < 2:
        return 0.0
    unit = moving / moving.norm(dim=0)
    rows, columns = torch.triu_indices(moving.shape[1], moving.shape[1], offset=1)
    return float((unit.T @ unit).abs()[rows, columns].mean())
