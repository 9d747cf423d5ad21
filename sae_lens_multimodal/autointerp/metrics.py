"""Formulas of the scores, as pure functions: rates, balanced accuracy, bootstrap intervals, derangements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Float64

Failures: TypeAlias = Literal["missing", "wrong"]
"""Whether a question without a usable answer is left out, or counts as answered wrongly."""

CHANCE = 0.5
"""Balanced accuracy of a judge that does not look."""


class Rates(NamedTuple):
    """How often a judge says yes."""

    tpr: float | None
    """Where yes is right; None where there was no such question."""
    fpr: float | None
    """Where no is right; None where there was no such question."""


class Interval(NamedTuple):
    """A mean and where it lies with some confidence."""

    mean: float
    low: float
    high: float
    n: int
    """Number of values."""


def rates(truths: Sequence[bool], answers: Sequence[bool | None], *, failures: Failures = "missing") -> Rates:
    """Share of yes among the questions where it is right, and among those where it is wrong.

    Args:
        truths: the right answer to each question.
        answers: the judge's; None for a failure.
        failures: how a failure counts.

    Example:
        >>> rates([True, True, False, False], [True, None, False, True])
        Rates(tpr=1.0, fpr=0.5)
        >>> rates([True, True, False, False], [True, None, False, True], failures="wrong")
        Rates(tpr=0.5, fpr=0.5)
    """
    said: dict[bool, list[bool]] = {True: [], False: []}
    for truth, answer in zip(truths, answers, strict=True):
        if answer is not None:
            said[truth].append(answer)
        elif failures == "wrong":
            said[truth].append(not truth)
    return Rates(*(sum(said[truth]) / len(said[truth]) if said[truth] else None for truth in (True, False)))


def balanced_accuracy(
    truths: Sequence[bool], answers: Sequence[bool | None], *, failures: Failures = "missing"
) -> float | None:
    """Mean of the accuracies on both kinds of question, (TPR + 1 - FPR) / 2: 0.5 for a judge that does not look.

    Returns:
        None where one kind of question has no answer.

    Example:
        >>> balanced_accuracy([True, True, False], [True, True, True])
        0.5
        >>> balanced_accuracy([True, False], [True, None]) is None
        True
        >>> balanced_accuracy([True, False], [True, None], failures="wrong")
        0.5
    """
    found = rates(truths, answers, failures=failures)
    if found.tpr is None or found.fpr is None:
        return None
    return (found.tpr + 1 - found.fpr) / 2


def bootstrap_mean(
    values: Sequence[float], *, seed: int, level: float = 0.95, n_resamples: int = 2000
) -> Interval | None:
    """Mean with a percentile bootstrap interval (Efron 1979), drawing values with replacement.

    Args:
        values: one a feature.
        seed: of the draws.
        level: share of the resampled means inside the interval.
        n_resamples: how many draws.

    Returns:
        None where there are no values.

    Example:
        >>> bootstrap_mean([0.25, 0.25, 0.25], seed=0)
        Interval(mean=0.25, low=0.25, high=0.25, n=3)
    """
    if not len(values):
        return None
    numbers = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(numbers), size=(n_resamples, len(numbers)))
    means = numbers[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(numbers.mean()), float(low), float(high), len(numbers))


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Rank correlation (Spearman 1904), equal values with the mean of their ranks.

    Returns:
        None where there are fewer than two values, or all of one side are equal.

    Example:
        >>> round(spearman([1, 2, 3, 4], [10, 20, 40, 30]), 6), spearman([1, 1], [1, 2])
        (0.8, None)
    """
    if len(left) < 2 or len(set(left)) < 2 or len(set(right)) < 2:
        return None
    return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


def _ranks(values: Sequence[float]) -> Float64[np.ndarray, "n"]:
    _, place, count = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = count.cumsum()
    return np.asarray((last - (count - 1) / 2)[place])


def auroc(above: Float[np.ndarray, "n"], below: Float[np.ndarray, "m"]) -> float:
    """Chance that a value of the first is greater than one of the second; equal ones count half (Mann-Whitney).

    Example:
        >>> auroc(np.array([0.9, 0.5]), np.array([0.1, 0.5]))
        0.875
    """
    difference = above[:, None] - below[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def expected_calibration_error(confidences: Sequence[float], truths: Sequence[bool], *, n_bins: int = 10) -> float:
    """Mean distance of confidence and frequency over equal bins, weighted by their size (Guo et al. 2017).

    Args:
        confidences: how sure the judge is that the answer is yes, from 0 to 1.
        truths: whether it is.
        n_bins: of confidence.

    Example:
        >>> round(expected_calibration_error([1.0, 1.0, 0.0, 0.0], [True, False, False, False]), 6)
        0.25
    """
    sure, right = np.asarray(confidences, dtype=np.float64), np.asarray(truths, dtype=np.float64)
    bins = np.minimum((sure * n_bins).astype(int), n_bins - 1)
    gaps = [
        abs(sure[bins == one].mean() - right[bins == one].mean()) * (bins == one).mean() for one in set(bins.tolist())
    ]
    return float(sum(gaps))


def derangement(texts: Sequence[str], *, seed: int) -> list[int | None]:
    """Give every text another one that reads differently, each as rarely as possible more than once.

    Where no text is more than half of them, the result is a permutation: every text is given exactly once.

    Args:
        texts: the explanations; some may be equal.
        seed: of the choice.

    Returns:
        For each text the index of the one it is given; None where all texts are equal.

    Example:
        >>> texts = ["red", "red", "circle", "star"]
        >>> given = derangement(texts, seed=0)
        >>> sorted(given), [texts[index] != text for index, text in zip(given, texts)]
        ([0, 1, 2, 3], [True, True, True, True])
        >>> derangement(["red", "red"], seed=0)
        [None, None]
    """
    rng = np.random.default_rng(seed)
    places = rng.permutation(len(texts)).tolist()
    groups: dict[str, list[int]] = defaultdict(list)
    for place in places:
        groups[texts[place]].append(place)
    line = [place for group in groups.values() for place in group]
    step = max((len(group) for group in groups.values()), default=0)
    given: list[int | None] = [None] * len(texts)
    for rank, place in enumerate(line):
        other = line[(rank + step) % len(line)]
        if texts[other] == texts[place]:
            different = [index for index in line if texts[index] != texts[place]]
            given[place] = different[int(rng.integers(len(different)))] if different else None
        else:
            given[place] = other
    return given
