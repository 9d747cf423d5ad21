"""Floors: their algebra against scikit-learn and plain linear algebra, and as SAEs that are trained and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sklearn.decomposition import PCA

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training.evaluate import measure
from sae_lens_multimodal.training.floors import (
    FLOORS,
    TokenMoments,
    axes_floor,
    build_floors,
    principal_axes,
    random_floor,
    sparsity_of,
    with_random_encoder,
)
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner
from sae_lens_multimodal.training.tokens import LabelledBatch
from sae_lens_multimodal.types import Modality


@pytest.fixture(scope="module")
def batches() -> list[LabelledBatch]:
    """Correlated activations far from zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 30
    labels = torch.full((600,), int(Modality.IMAGE), dtype=torch.int8)
    return [LabelledBatch(*pair) for pair in zip(x.split(250), labels.split(250), strict=True)]


@pytest.fixture(scope="module")
def moments(batches: list[LabelledBatch]) -> TokenMoments:
    return TokenMoments.of(batches)


def rows_of(batches: list[LabelledBatch]) -> torch.Tensor:
    return torch.cat([batch.activations for batch in batches])


def test_moments_are_numpys(batches: list[LabelledBatch], moments: TokenMoments) -> None:
    x = rows_of(batches).double().numpy()
    assert np.allclose(moments.mean, x.mean(0))
    assert np.allclose(moments.covariance, np.cov(x.T, bias=True))
    assert torch.equal(moments.sample, rows_of(batches))


def test_principal_axes_are_scikit_learns(batches: list[LabelledBatch], moments: TokenMoments) -> None:
    found = PCA().fit(rows_of(batches).double().numpy()).components_
    assert np.allclose(np.abs((principal_axes(moments).numpy() * found).sum(1)), 1, atol=1e-6)


@pytest.mark.parametrize("k", [None, 12, 3])
def test_axes_reconstruct_as_linear_algebra_says(
    batches: list[LabelledBatch], moments: TokenMoments, k: int | None
) -> None:
    axes = principal_axes(moments)
    sae = axes_floor(moments, axes, k)
    x = rows_of(batches).double()
    parts = (x - moments.mean) @ axes.T
    if k is not None:
        weakest = parts.abs().argsort(descending=True)[:, k:]
        parts = parts.scatter(1, weakest, 0.0)
    expected = moments.mean + parts @ axes
    assert torch.allclose(sae(x.float()).double(), expected, atol=1e-3)
    metrics = measure(sae, batches)["image"]
    assert metrics.l0 == pytest.approx(12 if k is None else k)
    if k != 3:
        assert metrics.explained_variance == pytest.approx(1, abs=1e-6)


def test_random_directions_are_scaled_to_fit_best(batches: list[LabelledBatch], moments: TokenMoments) -> None:
    sae = random_floor(moments, 40, 3, seed=1)
    best = measure(sae, batches)["image"].explained_variance
    assert best is not None and best > 0
    for factor in (0.9, 1.1):
        other = random_floor(moments, 40, 3, seed=1)
        other.W_dec.data *= factor
        worse = measure(other, batches)["image"].explained_variance
        assert worse is not None and worse < best
    assert not torch.equal(sae.W_enc, random_floor(moments, 40, 3, seed=2).W_enc)


def test_floors_have_the_saes_sparsity_and_are_saved_as_saes(
    batches: list[LabelledBatch], moments: TokenMoments, tmp_path: Path
) -> None:
    sae = random_floor(moments, 50, 5)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    assert sparsity_of(sae, moments.sample) == 5
    floors = build_floors(sae, moments)
    assert set(floors) == set(FLOORS)
    for name, floor in floors.items():
        assert measure(floor, batches)["image"].l0 == pytest.approx(5)
        assert floor.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
        floor.save_model(str(tmp_path / name))
        loaded = SAE.load_from_disk(tmp_path / name)
        assert torch.equal(loaded(batches[0].activations), floor(batches[0].activations))
    with pytest.raises(ConfigError, match="no floor 'ica'"):
        build_floors(sae, moments, ["ica"])
    with pytest.raises(ConfigError, match="Got 0 tokens"):
        TokenMoments.of([])


def test_a_frozen_random_encoder_is_trained_like_any_sae(
    model: VisionLanguageModel, make_config: Any, rows: list[dict[str, Any]]
) -> None:
    config = make_config(n_eval_batches=0, output_path=None)
    fresh = TrainingSAE.from_dict({**config.get_training_sae_cfg_dict(), "d_in": model.d_model})
    floor = with_random_encoder(fresh, seed=3)
    before = {name: parameter.detach().clone() for name, parameter in floor.named_parameters()}
    runner = MultimodalSAETrainingRunner(config, rows, model, override_sae=floor)
    runner.run()
    for name, parameter in runner.sae.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in ("W_dec", "b_dec")), name
    assert torch.allclose(runner.sae.W_enc.norm(dim=0), torch.ones(64), atol=1e-5)
