"""What a family is for: loading from a folder, steering, harvesting, training and attribution work as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from torch import Tensor
from transformers.utils.import_utils import is_torchvision_available

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.features.harvest import harvest
from sae_lens_multimodal.hooks.attribute import attribute
from sae_lens_multimodal.hooks.metrics import LogitDifference
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.steer import Set, steer
from sae_lens_multimodal.training.config import build_config
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner
from tests.adapters.adapter_samples import mixed_prompts, picture, prompt

HOOK = "blocks.0.hook_resid_post"
FEATURE = 3


def random_sae(model: VisionLanguageModel, d_sae: int = 64) -> SAE[Any]:
    config = TopKSAEConfig(d_in=model.d_model, d_sae=d_sae, k=6)
    config.metadata.hook_name = HOOK
    sae = TopKSAE(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
    return sae


@contextlib.contextmanager
def block_changed(model: VisionLanguageModel, change: Any) -> Iterator[None]:
    """A plain PyTorch hook on the first block of the language model, found without the adapter."""

    def hook(_: object, __: object, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = model._module.get_decoder().layers[0].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_saved_folder_loads_and_is_the_same_model(
    random_model: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    random_model._module.save_pretrained(tmp_path)
    random_model.processor.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, attn_implementation="eager")
    assert type(loaded.family) is type(random_model.family)
    batch, own = loaded.encode(mixed_prompts()), random_model.encode(mixed_prompts())
    assert batch.keys() == own.keys()
    for name, value in batch.items():
        if value.is_floating_point() and is_torchvision_available():
            # transformers then resizes with it, and a few pixels differ by rounding
            assert (value - own[name]).abs().mean() < 0.01
        else:
            assert torch.equal(value, own[name])
    assert torch.equal(batch.layout.boxes.nan_to_num(-1), own.layout.boxes.nan_to_num(-1))
    # where the machine has a grouped product, loading chooses it for experts: its sums round otherwise
    loaded._module.set_experts_implementation(random_model._module.get_experts_implementation())
    with torch.no_grad():
        assert torch.equal(loaded._module(**batch).logits, random_model._module(**batch).logits)


def test_steering_is_a_plain_hook(random_model: VisionLanguageModel) -> None:
    sae, batch = random_sae(random_model), random_model.encode(mixed_prompts(), add_generation_prompt=True)
    steered = steer(random_model, sae, {FEATURE: Set(8.0)}, tokens="image")
    at_first = [batch.layout.is_image]

    def change(x: Tensor) -> Tensor:
        if not at_first or x.shape[1] == 1:
            return x
        mask, new = at_first[0], x.clone()
        z = sae.encode(x[mask])
        new[mask] = x[mask] + (8.0 - z[:, FEATURE : FEATURE + 1]) * sae.W_dec[FEATURE]
        return new

    with torch.no_grad():
        plain = random_model._module(**batch).logits
        with block_changed(random_model, change):
            expected = random_model._module(**batch).logits
        with steered.trace(**batch):
            found = steered.output.logits.save()
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        scored = {**options, "output_scores": True, "return_dict_in_generate": True}
        with block_changed(random_model, change):
            by_hand = random_model._module.generate(**batch, **scored)
        generated = steered.generate(**batch, **scored)
    torch.testing.assert_close(torch.stack(generated.scores), torch.stack(by_hand.scores), atol=1e-5, rtol=1e-5)
    assert torch.equal(generated.sequences, by_hand.sequences)


def rows(count: int = 6) -> list[dict[str, Any]]:
    pictured = [
        {"messages": prompt(picture(40 + 9 * index, 70 - 6 * index, index), "is this a red circle ?", answer="yes .")}
        for index in range(count)
    ]
    return [*pictured, {"messages": prompt("what is there and what is this ?", answer="a green square .")}]


def test_a_harvest_finds_what_a_plain_hook_sees(random_model: VisionLanguageModel, tmp_path: Path) -> None:
    sae, prompts = random_sae(random_model), rows(3)
    store = harvest(random_model, sae, prompts, tmp_path / "store", n_top=2, batch_size=2, progress=False)
    highest, n_tokens = torch.zeros(sae.cfg.d_sae), {"image": 0, "text": 0}
    for row in prompts:
        batch = random_model.encode(row["messages"])
        kept: list[Tensor] = []
        with torch.no_grad(), block_changed(random_model, lambda x, kept=kept: kept.append(x) or x):
            random_model._module(**batch)
            z = sae.encode(kept[0])
        image = batch.layout.is_image
        n_tokens["image"] += int(image.sum())
        n_tokens["text"] += int(batch.layout.is_text.sum())
        if image.any():
            highest = torch.maximum(highest, z[image].amax(0))
    assert store.settings["n_tokens"] == n_tokens
    feature = int(highest.argmax())
    best = store.examples(feature, "top", "image")[0]
    assert best.max_image == pytest.approx(float(highest[feature]), rel=1e-4)
    assert len(best.tokens) == best.layout.n_tokens


def test_an_sae_trains_on_it(random_model: VisionLanguageModel, tmp_path: Path) -> None:
    config = build_config(
        {
            "model_name": random_model.name,
            "hook_name": HOOK,
            "sae": {"architecture": "topk", "d_sae": 32, "k": 4},
            "token_shares": {"image": 0.5, "text": 0.5},
            "train_batch_size_tokens": 32,
            "training_tokens": 32 * 3,
            "n_batches_in_buffer": 2,
            "store_batch_size_prompts": 2,
            "n_eval_batches": 1,
            "lr": 1e-2,
            "device": "cpu",
            "output_path": str(tmp_path / "sae"),
            "checkpoint_path": None,
            "progress": False,
        }
    )
    trained = MultimodalSAETrainingRunner(config, override_dataset=rows(), override_model=random_model).run()
    loaded = SAE.load_from_disk(config.output_path)
    assert loaded.cfg.d_in == random_model.d_model
    batch = random_model.encode(rows(1)[0]["messages"])
    x = read_activations(random_model, batch, HOOK)[HOOK]
    assert torch.equal(loaded.encode(x), trained.encode(x))
    assert loaded(x).isfinite().all()


def test_attribution_is_that_of_autograd(random_model: VisionLanguageModel) -> None:
    sae, batch = random_sae(random_model), random_model.encode(mixed_prompts()[:2], add_generation_prompt=True)
    found = attribute(random_model, sae, batch, LogitDifference("red", "blue"))
    kept: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        kept.append(x.detach().requires_grad_())
        return kept[0]

    with block_changed(random_model, leaf):
        logits = random_model._module(**batch).logits
    red, blue = (random_model.tokenizer.convert_tokens_to_ids(word) for word in ("red", "blue"))
    values = logits[:, -1, red] - logits[:, -1, blue]
    (gradient,) = torch.autograd.grad(values.sum(), kept[0])
    with torch.no_grad():
        effects = -sae.encode(kept[0]) * (gradient @ sae.W_dec.T)
        # features, error and bias make up the whole of x
        whole = -(kept[0] * gradient).sum(-1) * batch["attention_mask"]
    torch.testing.assert_close(found.values, values.detach(), atol=1e-5, rtol=1e-4)
    features = effects.sum(-1) * batch["attention_mask"]
    torch.testing.assert_close(found.by_token(), features, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found.by_token(part="all"), whole, atol=1e-5, rtol=1e-3)
    assert float(features.abs().max()) > 1e-4
