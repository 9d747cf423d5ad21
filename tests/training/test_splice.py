"""Losses with spliced activations, against transformers' own loss and hand-written PyTorch hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.batches import encoded_batches
from sae_lens_multimodal.data.rows import row_to_prompt
from sae_lens_multimodal.training.floors import TokenMoments, axes_floor, random_floor
from sae_lens_multimodal.training.splice import (
    by_mean,
    by_sae,
    by_zero,
    recovered,
    replaced_tokens,
    splice_losses,
    spliced_logits,
    target_losses,
    text_targets,
)
from sae_lens_multimodal.training.tokens import TokenChoice, read_tokens
from sae_lens_multimodal.types import Modality

HOOK = "blocks.1.hook_resid_post"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def batches(model: VisionLanguageModel, rows: Rows) -> list[EncodedBatch]:
    prompts = map(row_to_prompt, rows[:6])
    return [one.batch for one in encoded_batches(model, prompts, batch_size=3, add_generation_prompt=False)]


@pytest.fixture(scope="module")
def moments(model: VisionLanguageModel, batches: list[EncodedBatch]) -> TokenMoments:
    return TokenMoments.of(read_tokens(model, batch, HOOK, TokenChoice()) for batch in batches)


def labels_of(batch: EncodedBatch) -> Tensor:
    """Labels for transformers' loss, which looks at no position but those of label -100."""
    labels = batch["input_ids"].masked_fill(batch.layout.modality != Modality.TEXT, -100)
    padding = batch.layout.modality == Modality.PADDING
    labels[:, 1:][padding[:, :-1]] = -100
    labels[:, 0] = -100
    return labels


def hooked_loss(model: VisionLanguageModel, batch: EncodedBatch, new_of: Any) -> float:
    """Transformers' own loss with a plain PyTorch hook on the block's output."""
    block = model._module.get_submodule("model.language_model.layers.1")

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        return new_of(output)

    handle = block.register_forward_hook(hook)
    try:
        with torch.no_grad():
            output = model._module(**batch, labels=labels_of(batch))
            return output.loss.item()
    finally:
        handle.remove()


def own_losses(model: VisionLanguageModel, batch: EncodedBatch, replace: Any, place: str) -> tuple[float, Tensor]:
    chosen = TokenChoice().select(batch.layout, batch["input_ids"])
    logits = spliced_logits(model, batch, HOOK, replace, replaced_tokens(batch.layout, chosen, place))
    labels = batch["input_ids"][:, 1:][text_targets(batch.layout)]
    return target_losses(logits, labels)[0].mean().item(), logits


def test_without_a_splice_the_loss_is_transformers_own(model: VisionLanguageModel, batches: list[EncodedBatch]) -> None:
    for batch in batches:
        loss = hooked_loss(model, batch, lambda output: output)
        assert own_losses(model, batch, None, "both")[0] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("place", ["image", "text", "both"])
@pytest.mark.parametrize("kind", ["zero", "mean", "sae"])
def test_a_splice_is_a_plain_pytorch_hook(
    model: VisionLanguageModel, batches: list[EncodedBatch], moments: TokenMoments, place: str, kind: str
) -> None:
    batch = batches[0]
    sae = random_floor(moments, 32, 4)
    means = {"image": moments.mean, "text": 2 * moments.mean}
    replace = {"zero": by_zero, "mean": by_mean(means), "sae": by_sae(sae)}[kind]

    def new_of(output: Tensor) -> Tensor:
        output = output.clone()
        for row in range(output.shape[0]):
            for column in range(output.shape[1]):
                code = batch.layout.modality[row, column].item()
                if code == Modality.IMAGE and place != "text":
                    name = "image"
                elif code == Modality.TEXT and place != "image":
                    name = "text"
                else:
                    continue
                token = output[row, column]
                output[row, column] = {
                    "zero": torch.zeros_like(token),
                    "mean": means[name].to(token),
                    "sae": sae(token[None])[0],
                }[kind]
        return output

    loss, _ = own_losses(model, batch, replace, place)
    assert loss == pytest.approx(hooked_loss(model, batch, new_of), abs=1e-4)
    assert loss != pytest.approx(own_losses(model, batch, None, place)[0], abs=2e-4), "and it is not nothing"


def test_the_identity_changes_nothing(
    model: VisionLanguageModel, batches: list[EncodedBatch], moments: TokenMoments
) -> None:
    identity = axes_floor(moments, torch.eye(model.d_model), None)

    def with_error(x: Tensor, modality: Tensor) -> Tensor:
        reconstruction = random_sae(x)
        return reconstruction + (x - reconstruction)

    random_sae = random_floor(moments, 32, 4)
    for replace, exact in ((lambda x, _: x, True), (with_error, False), (by_sae(identity), False)):
        for place in ("image", "text", "both"):
            untouched = own_losses(model, batches[0], None, place)[1]
            found = own_losses(model, batches[0], replace, place)[1]
            if exact:
                assert torch.equal(found, untouched)
            else:
                assert torch.allclose(found, untouched, atol=1e-3)


def test_losses_by_place(model: VisionLanguageModel, batches: list[EncodedBatch], moments: TokenMoments) -> None:
    replacements = {
        "identity": by_sae(axes_floor(moments, torch.eye(model.d_model), None)),
        "nothing": by_zero,
    }
    means = {"image": moments.mean, "text": moments.mean}
    report = splice_losses(model, replacements, means, batches, hook_name=HOOK)
    targets = [text_targets(batch.layout) for batch in batches]
    assert report["both"]["n_targets"] == sum(int(one.sum()) for one in targets)
    # of prompts without a picture nothing is replaced at image tokens, so they do not count there
    pictured = [int(t[b.layout.is_image.any(1)].sum()) for t, b in zip(targets, batches, strict=True)]
    assert report["image"]["n_targets"] == sum(pictured) < report["both"]["n_targets"]
    for place in ("image", "text", "both"):
        found = report[place]
        assert found["identity"]["ce"] == pytest.approx(found["ce"], abs=1e-4)
        assert found["identity"]["kl"] == pytest.approx(0, abs=1e-4)
        assert found["nothing"]["ce"] == found["zero"]["ce"]
        assert found["nothing"]["kl"] == found["zero"]["kl"]
        zero_loses = found["zero"]["ce"] > found["ce"]
        assert found["nothing"]["recovered_from_zero"] == (0.0 if zero_loses else None)
        for floor in ("zero", "mean"):
            assert found[floor]["kl"] > 0.01
        if zero_loses:
            assert found["identity"]["recovered_from_zero"] == pytest.approx(1.0, abs=1e-3)
    assert report["both"]["zero"]["kl"] > report["image"]["zero"]["kl"]


def test_kl_and_cross_entropy_are_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(700, 11, generator=generator), torch.randn(700, 11, generator=generator)
    labels = torch.randint(11, (700,), generator=generator)
    ce, kl = target_losses(logits, labels, other)
    assert torch.allclose(ce, torch.nn.functional.cross_entropy(logits, labels, reduction="none"), atol=1e-5)
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), other.softmax(-1), reduction="none").sum(-1)
    assert torch.allclose(kl, expected, atol=1e-5)


def test_a_floor_that_loses_nothing_recovers_nothing() -> None:
    assert recovered(1.0, 1.2, 1.0) is None
    assert recovered(1.0, 1.0, 2.0) == 1.0
    assert recovered(1.0, 3.0, 2.0) == -1.0


def test_outliers_are_left_alone(model: VisionLanguageModel, batches: list[EncodedBatch]) -> None:
    batch = batches[0]
    where = TokenChoice().select(batch.layout, batch["input_ids"])
    plain = spliced_logits(model, batch, HOOK)
    none = spliced_logits(model, batch, HOOK, by_zero, where, max_norm_ratio=1e-6)
    some = spliced_logits(model, batch, HOOK, by_zero, where, max_norm_ratio=1.0)
    assert torch.equal(none, plain)
    assert not torch.equal(some, plain)
    assert not torch.equal(some, spliced_logits(model, batch, HOOK, by_zero, where))
