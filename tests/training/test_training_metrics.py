"""Metrics against cases worked by hand, and running sums against the whole at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_multimodal.training.metrics import (
    FeatureUse,
    ReconstructionTotals,
    as_report,
    explained_variance,
    explained_variance_by_modality,
)
from sae_lens_multimodal.types import Modality


def test_explained_variance_by_hand() -> None:
    # mean (2, 0): squared distances 4 + 4 = 8; squared errors 1 + 1 = 2
    x = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    x_hat = torch.tensor([[1.0, 0.0], [4.0, 1.0]])
    assert explained_variance(x, x_hat) == pytest.approx(0.75)


def test_the_mean_explains_nothing_and_a_worse_guess_is_negative() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert explained_variance(x, x.mean(0).expand_as(x)) == pytest.approx(0.0, abs=1e-6)
    worse = explained_variance(x, -3 * x)
    assert worse is not None and worse < 0


def test_without_variance_there_is_no_number() -> None:
    assert explained_variance(torch.ones(1, 2), torch.ones(1, 2)) is None
    assert explained_variance(torch.ones(3, 2), torch.zeros(3, 2)) is None
    assert explained_variance(torch.ones(0, 2), torch.zeros(0, 2)) is None


def test_each_modality_has_its_own_mean() -> None:
    # Far apart, each constant: pooled, the means alone would explain nearly everything.
    x = torch.tensor([[0.0], [2.0], [100.0], [102.0]])
    x_hat = torch.tensor([[1.0], [1.0], [100.0], [102.0]])
    modality = torch.tensor([Modality.IMAGE, Modality.IMAGE, Modality.TEXT, Modality.TEXT])
    assert explained_variance_by_modality(x, x_hat, modality) == {"image": 0.0, "text": 1.0}


def test_totals_by_hand() -> None:
    totals = ReconstructionTotals()
    totals.add(
        torch.tensor([[0.0, 0.0], [4.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [4.0, 1.0]]),
        torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.1, 2.0, 0.0, 0.0]]),
    )
    metrics = totals.metrics()
    assert metrics.n_tokens == 2
    assert metrics.explained_variance == pytest.approx(0.75)
    assert metrics.l0 == 1.5
    assert metrics.l1 == pytest.approx((0.5 + 0.1 + 2.0) / 2)
    assert metrics.dead_share == 0.5
    assert metrics.dense_share == 0.5
    # squared errors 1 + 1, squared sizes 0 + 16; cosine 0 (of a zero vector) and 16 / (4 * sqrt(17))
    assert metrics.normalised_mse == pytest.approx(2 / 16)
    assert metrics.cosine == pytest.approx(4 / 17**0.5 / 2)


def test_feature_use_by_hand() -> None:
    image, text = ReconstructionTotals(), ReconstructionTotals()
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    image.add(x, x, torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 2], [0, 0, 0, 2], [1, 0, 0, 2]]))
    text.add(x[:2], x[:2], torch.tensor([[0.0, 3, 0, 1], [0, 0, 0, 0]]))
    use = FeatureUse.of({"image": image, "text": text}, 4)
    assert use.density["image"].tolist() == [0.5, 0, 0, 1]
    assert use.mean["text"].tolist() == [0, 1.5, 0, 0.5]
    assert use.modality_score.tolist()[:2] == [1, 0]
    assert np.isnan(use.modality_score[2])
    assert use.modality_score[3] == pytest.approx(2 / 2.5)
    assert use.summary() == {"image_only": 1, "text_only": 1, "both": 1, "neither": 1}
    assert torch.allclose(image.mean, x.double().mean(0))


def test_no_tokens_give_no_numbers() -> None:
    totals = ReconstructionTotals()
    totals.add(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 4))
    report = as_report({"text": totals.metrics()})["text"]
    assert report.pop("n_tokens") == 0
    assert len(report) == 7
    assert set(report.values()) == {None}


@given(st.integers(0, 1000), st.lists(st.integers(1, 7), min_size=1, max_size=5), st.floats(0, 1e4))
def test_running_sums_give_what_the_whole_gives(seed: int, sizes: list[int], far: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 4, generator=generator) + far
    x_hat = x + 0.1 * torch.randn(len(x), 4, generator=generator)
    features = torch.randn(len(x), 6, generator=generator).relu()
    totals = ReconstructionTotals()
    for parts in zip(x.split(sizes), x_hat.split(sizes), features.split(sizes), strict=True):
        totals.add(*parts)
    metrics, whole = totals.metrics(), explained_variance(x, x_hat)
    assert (metrics.explained_variance is None) == (whole is None)
    if whole is not None:
        assert metrics.explained_variance == pytest.approx(whole, rel=1e-6, abs=1e-6)
    assert metrics.l0 == pytest.approx((features > 0).sum(1).double().mean().item())
