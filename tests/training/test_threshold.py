"""Thresholds of saved BatchTopK SAEs: both modalities fire as they are meant to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

from sae_lens_multimodal.training.threshold import (
    Firings,
    balanced_thresholds,
    save_with_thresholds,
    settle_thresholds,
)
from sae_lens_multimodal.training.tokens import LabelledBatch
from sae_lens_multimodal.types import Modality

K, WIDTH = 4, 64


def make_sae(k: float = K, *, rescale: bool = False) -> BatchTopKTrainingSAE:
    """An SAE whose features are the 64 directions of the space: features 0..31 for images, the others for text."""
    config = BatchTopKTrainingSAEConfig(d_in=WIDTH, d_sae=WIDTH, k=k, rescale_acts_by_decoder_norm=rescale)
    sae = BatchTopKTrainingSAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(WIDTH))
        sae.W_dec.copy_(torch.eye(WIDTH))
    return sae


def batches(seed: int, image_scale: float, shared: float = 0.0) -> Iterator[LabelledBatch]:
    """Image tokens are weak, text tokens strong; `shared` is how much of the other's directions each holds."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.rand(128, WIDTH, generator=generator) ** 4
        modality = torch.tensor([Modality.IMAGE] * 64 + [Modality.TEXT] * 64, dtype=torch.int8)
        rows[:64, 32:] *= shared
        rows[64:, :32] *= shared
        rows[:64] *= image_scale
        yield LabelledBatch(rows, modality)


def l0(sae: SAE, batch: LabelledBatch) -> dict[str, float]:
    fired = sae.encode(batch.activations).bool().sum(-1).float()
    return {
        name: fired[batch.modality == code].mean().item()
        for name, code in (("image", Modality.IMAGE), ("text", Modality.TEXT))
    }


def saved(sae: BatchTopKTrainingSAE, folder: Path) -> SAE:
    sae.save_inference_model(str(folder))
    return SAE.load_from_disk(folder)


@pytest.mark.parametrize("shared", [0.0, 0.03])
@pytest.mark.parametrize("rescale", [False, True])
def test_one_threshold_starves_a_modality_and_balanced_ones_do_not(
    tmp_path: Path, shared: float, rescale: bool
) -> None:
    further = next(batches(1, 0.1, shared))
    with torch.no_grad():
        pooled, balanced = make_sae(rescale=rescale), make_sae(rescale=rescale)
        for sae in (pooled, balanced):
            # decoder norms other than one, which SAE-Lens folds into the weights as it saves
            sae.W_dec.mul_(torch.linspace(0.9, 1.1, WIDTH)[:, None])
    settle_thresholds(pooled, batches(0, 0.1, shared), balanced=False)
    settle_thresholds(balanced, batches(0, 0.1, shared))
    starved = l0(saved(pooled, tmp_path / "pooled"), further)
    assert starved["image"] < 0.1 * K
    assert starved["image"] + starved["text"] == pytest.approx(2 * K, rel=0.15)
    fair = l0(saved(balanced, tmp_path / "balanced"), further)
    assert fair["image"] == pytest.approx(K, rel=0.15)
    assert fair["text"] == pytest.approx(K, rel=0.15)


def test_saes_lens_own_running_threshold_starves_too(tmp_path: Path) -> None:
    # what SAE-Lens's training step does to its threshold, until it no longer moves
    sae = make_sae()
    for _, batch in zip(range(1500), batches(0, 0.1), strict=False):
        sae.update_topk_threshold(sae.encode(batch.activations))
    fired = l0(saved(sae, tmp_path), next(batches(1, 0.1)))
    assert fired["image"] < 0.1 * K < K < fired["text"]


def test_where_no_thresholds_balance_nothing_is_lost(tmp_path: Path) -> None:
    # Every text token moves the images' features five times as far as an image token does.
    further = next(batches(1, 0.1, 0.5))
    pooled, balanced = make_sae(), make_sae()
    settle_thresholds(pooled, batches(0, 0.1, 0.5), balanced=False)
    settle_thresholds(balanced, batches(0, 0.1, 0.5))
    starved, fairer = l0(saved(pooled, tmp_path / "a"), further), l0(saved(balanced, tmp_path / "b"), further)
    assert abs(fairer["text"] - fairer["image"]) < 1.1 * abs(starved["text"] - starved["image"])
    assert fairer["image"] + fairer["text"] == pytest.approx(2 * K, rel=0.15)


def test_two_thresholds_solve_both_equations_by_hand() -> None:
    # Feature 0 is the images': it fires at 1, 2, 3, 4 on four image tokens, and at 9 on one text token.
    # Feature 1 is the texts': at 10, 20, 30, 40 on four text tokens, never on an image.
    image = Firings(4, [torch.tensor([1.0, 2.0, 3.0, 4.0])], [torch.zeros(4, dtype=torch.int32)])
    text = Firings(
        4,
        [torch.tensor([9.0, 10.0, 20.0, 30.0, 40.0])],
        [torch.tensor([0, 1, 1, 1, 1], dtype=torch.int32)],
    )
    thresholds = balanced_thresholds({"image": image, "text": text}, k=0.5, d_sae=2)
    # Two image values are to be above t_0, so 2 < t_0 < 3; then 9 is above it too, and one text value above t_1.
    assert thresholds is not None
    assert 2 < thresholds[0] < 3
    assert 30 < thresholds[1] < 40


def test_one_modality_has_one_threshold() -> None:
    firing = Firings(2, [torch.tensor([1.0, 2.0, 3.0, 4.0])], [torch.tensor([0, 1, 0, 1], dtype=torch.int32)])
    thresholds = balanced_thresholds({"text": firing}, k=1, d_sae=3)
    assert thresholds is not None
    assert thresholds.tolist() == [2.5] * 3


def test_an_sae_that_never_fires_keeps_its_threshold() -> None:
    assert (
        balanced_thresholds({"text": Firings(2, [torch.zeros(0)], [torch.zeros(0, dtype=torch.int32)])}, 1, 3) is None
    )


def test_only_the_one_sae_is_saved_differently(tmp_path: Path) -> None:
    mine, other = make_sae(), make_sae()
    save_with_thresholds(mine, torch.arange(float(WIDTH)))
    assert saved(mine, tmp_path / "a").threshold.tolist() == list(range(WIDTH))
    assert saved(other, tmp_path / "b").threshold.tolist() == [0.0] * WIDTH
