"""Average precision from sparse activations, against scikit-learn; cross-modal features, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from sae_lens_multimodal.features import precision as precision_module
from sae_lens_multimodal.features.cross_modal import cross_modal_fits, mismatched_share
from sae_lens_multimodal.features.precision import (
    ABSENT,
    PRESENT,
    UNSURE,
    Firings,
    above_chance,
    concept_precisions,
    prevalence_of,
)


def firings_of(values: np.ndarray) -> Firings:
    token, feature = values.nonzero()
    return Firings(token, feature, values[token, feature])


@pytest.mark.parametrize("pairs", [1, 50, 1 << 22])
@pytest.mark.parametrize("levels", [3, 1000])
def test_it_is_scikit_learns_with_and_without_ties(monkeypatch: pytest.MonkeyPatch, levels: int, pairs: int) -> None:
    monkeypatch.setattr(precision_module, "_PAIRS", pairs)
    rng = np.random.default_rng(levels)
    labels = rng.choice([PRESENT, ABSENT, UNSURE], p=[0.15, 0.7, 0.15], size=(150, 5)).astype(np.int8)
    labels[:, 4] = ABSENT
    values = rng.integers(1, levels + 1, (150, 7)).astype(np.float32) * (rng.random((150, 7)) < 0.4)
    values[:, 2] = 0  # a feature that never fires
    values[:, 3] = 1  # one that fires everywhere alike
    values[:, 6] = 0
    found = concept_precisions(firings_of(values), labels, n_features=7)
    for feature in range(7):
        for concept in range(4):
            known = labels[:, concept] != UNSURE
            expected = average_precision_score(labels[known, concept] == PRESENT, values[known, feature])
            assert found[feature, concept] == pytest.approx(expected, abs=1e-9)
    assert np.isnan(found[:, 4]).all()


def test_no_tokens_and_no_firings() -> None:
    labels = np.array([[PRESENT], [ABSENT]], dtype=np.int8)
    assert concept_precisions(firings_of(np.zeros((2, 3), np.float32)), labels, n_features=3).tolist() == [[0.5]] * 3
    nothing = concept_precisions(firings_of(np.zeros((0, 3), np.float32)), labels[:0], n_features=3)
    assert np.isnan(nothing).all()


def test_firings_among_some_tokens() -> None:
    firings = firings_of(np.array([[1.0, 0], [0, 2], [3, 0], [0, 4]], dtype=np.float32))
    kept = firings.among(np.array([False, True, True, False]))
    assert (kept.token.tolist(), kept.feature.tolist(), kept.value.tolist()) == ([0, 1], [1, 0], [2, 3])


def test_chance_is_the_share_of_what_shows_it() -> None:
    labels = np.array([[PRESENT], [ABSENT], [UNSURE], [ABSENT]], dtype=np.int8)
    assert prevalence_of(labels).tolist() == [pytest.approx(1 / 3)]
    assert above_chance(np.array(1.0), np.array(1.0)) == 0.0
    assert np.isnan(above_chance(np.array(np.nan), np.array(0.0)))


def test_cross_modal_features_by_hand() -> None:
    chance = np.zeros(3)
    # feature 0: sees and names concept 1; 1: sees 0, names 2; 2: sees all, names none; 3: concept 2 weakly
    image = np.array([[0.1, 0.9, 0.2], [0.9, 0.0, 0.1], [0.9, 0.9, 0.9], [0, 0, 0.6]])
    text = np.array([[0.7, 0.8, np.nan], [0.0, 0.1, 0.9], [0.1, 0.1, 0.1], [0, 0, 0.5]])
    fits = cross_modal_fits(image, text, image_chance=chance, text_chance=chance)
    assert [(one.feature, one.concept, one.fit) for one in fits] == [(0, 1, 0.8), (3, 2, 0.5)]
    assert not cross_modal_fits(image, text, image_chance=chance, text_chance=np.full(3, 0.85))
    groups = ["colour", "colour", "shape"]
    # colours exchanged: feature 0 sees 1 and names 0, which counts as 1; the lone shape stands for nothing
    share = mismatched_share(image, text, image_chance=chance, text_chance=chance, groups=groups)
    assert share == 0.25
