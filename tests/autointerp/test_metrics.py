"""The formulas, against independent ones."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from sae_lens_multimodal.autointerp.metrics import balanced_accuracy, bootstrap_mean, derangement, rates

ANSWERS = st.lists(st.tuples(st.booleans(), st.sampled_from([True, False, None])), max_size=30)


@settings(deadline=None)
@given(ANSWERS)
def test_balanced_accuracy_is_that_of_scikit_learn(pairs: list[tuple[bool, bool | None]]) -> None:
    answered = [(truth, answer) for truth, answer in pairs if answer is not None]
    ours = balanced_accuracy([truth for truth, _ in pairs], [answer for _, answer in pairs])
    if len({truth for truth, _ in answered}) < 2:
        assert ours is None
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = balanced_accuracy_score([truth for truth, _ in answered], [answer for _, answer in answered])
    assert ours == pytest.approx(theirs)


@settings(deadline=None)
@given(ANSWERS)
def test_failures_never_help_when_they_count_as_wrong(pairs: list[tuple[bool, bool | None]]) -> None:
    truths, answers = [truth for truth, _ in pairs], [answer for _, answer in pairs]
    missing, wrong = balanced_accuracy(truths, answers), balanced_accuracy(truths, answers, failures="wrong")
    if missing is not None:
        assert wrong is not None
        assert wrong <= missing + 1e-12
    if None not in answers:
        assert missing == wrong


def test_all_failures_count_as_all_wrong() -> None:
    assert rates([True, False], [None, None]) == (None, None)
    assert rates([True, False], [None, None], failures="wrong") == (0.0, 1.0)
    assert balanced_accuracy([True, False], [None, None], failures="wrong") == 0.0


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        found = bootstrap_mean(rng.normal(0.3, 1.0, size=60).tolist(), seed=seed, n_resamples=400)
        assert found is not None
        hits += found.low <= 0.3 <= found.high
    assert 0.90 <= hits / 200 <= 0.98


def test_interval_depends_on_the_seed_alone() -> None:
    values = [0.1, 0.5, 0.9, 0.2]
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean([], seed=0) is None


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdef"), max_size=40), st.integers(0, 5))
def test_everyone_is_given_another_text(texts: list[str], seed: int) -> None:
    given_to = derangement(texts, seed=seed)
    for text, other in zip(texts, given_to, strict=True):
        assert other is None if len(set(texts)) == 1 else other is not None and texts[other] != text
    if texts and max(Counter(texts).values()) <= len(texts) / 2:
        assert sorted(index for index in given_to if index is not None) == list(range(len(texts)))
    assert derangement(texts, seed=seed) == given_to
