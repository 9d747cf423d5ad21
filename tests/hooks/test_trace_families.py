"""Tracing, contributions, knockout and lens on a random model of every family, against plain PyTorch hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.registry import find_family
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.attention import attention_contributions
from sae_lens_multimodal.hooks.attention_knockout import knock_out
from sae_lens_multimodal.hooks.lens import logit_lens
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.trace import causal_trace
from tests.hooks.trace_samples import ask, plain_logits, plain_restore

FAMILIES = (
    "llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "gemma3", "glm4v", "paligemma", "idefics3", "mistral3",
)  # fmt: skip
"""One of each way to run blocks: plain, mixed positions, pictures added between blocks, masks that look ahead."""
HOOKS = {"resid": "hook_resid_post", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}
CLEAN, CORRUPTED = ask((200, 10, 10)), ask((10, 200, 60))


@pytest.fixture(scope="module", params=FAMILIES)
def one(request: pytest.FixtureRequest) -> VisionLanguageModel:
    module, processor = find_family(request.param, name=request.param).random_model()
    return load_model(module, processor=processor)


def test_cells_are_those_of_plain_hooks(one: VisionLanguageModel) -> None:
    clean, corrupted = (one.encode(each, add_generation_prompt=True) for each in (CLEAN, CORRUPTED))
    difference = plain_logits(one, clean)[-1] - plain_logits(one, corrupted)[-1]
    high, low = int(difference.argmax()), int(difference.argmin())
    image = clean.layout.is_image[0].nonzero()[:, 0].tolist()
    places = [image[1], image[-1], clean.layout.n_tokens - 3, clean.layout.n_tokens - 1]
    found = causal_trace(
        one, CLEAN, CORRUPTED, answer=high, against=low, parts=list(HOOKS), positions=places,
        metric="logit_difference", min_gap=None,
    )  # fmt: skip
    for layer in range(one.n_layers):
        for row, hook in enumerate(HOOKS.values()):
            for column, position in enumerate(sorted(places)):
                name = f"blocks.{layer}.{hook}"
                if hook == "hook_resid_post" and layer + 1 < one.n_layers:
                    name = f"blocks.{layer + 1}.hook_resid_pre"  # with what a family adds between its blocks
                logits = plain_restore(one, clean, corrupted, [name], [position])
                expected = float(logits[-1, high] - logits[-1, low])
                value = float(found.values["logit_difference"][row, layer, column])
                assert value == pytest.approx(expected, rel=1e-4, abs=1e-4), (layer, hook, position)


def test_restoring_everything_gives_all_of_it_back(one: VisionLanguageModel) -> None:
    found = causal_trace(
        one, CLEAN, CORRUPTED, parts="resid", positions={"everything": "all"}, min_gap=None, metric="log_probability"
    )
    assert found.clean["log_probability"] != pytest.approx(found.corrupted["log_probability"], rel=1e-4)
    assert found.restored.flatten().tolist() == pytest.approx([1.0] * one.n_layers, abs=2e-3)


def test_contributions_add_up_and_the_lens_ends_in_the_model(one: VisionLanguageModel) -> None:
    batch = one.encode(CLEAN, add_generation_prompt=True)
    found = attention_contributions(one, CLEAN, targets="all")
    for layer in range(one.n_layers):
        # in some families there is a norm between the projection and what is added to the residual stream
        name = f"blocks.{layer}.hook_attn_out"
        assert torch.allclose(found.total()[layer], read_activations(one, batch, name)[name][0].detach(), atol=1e-4)
        part = found.parts[layer]
        at = batch.layout.n_tokens - 1
        by_hand = [part.vectors(torch.tensor([source]))[:, at].norm(dim=-1) for source in (0, at - 1, at)]
        assert torch.allclose(found.by_head()[layer, :, at, [0, at - 1, at]].T, torch.stack(by_hand), atol=1e-5)
    lens = logit_lens(one, CLEAN, layers=[one.n_layers - 1], positions="last", k=2)
    expected = plain_logits(one, batch)[-1].softmax(-1)[: len(one.tokenizer)].topk(2).values
    assert torch.allclose(lens.top_probability[0, 0], expected, atol=1e-5)


def test_what_is_knocked_out_cannot_matter(one: VisionLanguageModel) -> None:
    """With no later token looking at the picture, another picture gives the same logits."""

    def after(layout: Any) -> torch.Tensor:
        later = torch.zeros_like(layout.is_image)
        later[:, int(layout.is_image[0].nonzero()[-1, 0]) + 1 :] = True
        return later

    edited = knock_out(one, lambda layout: layout.image_index >= 0, after)
    found = []
    for each in (edited, one):
        pair = []
        for prompt in (CLEAN, CORRUPTED):
            batch = one.encode(prompt, add_generation_prompt=True)
            with torch.no_grad(), each.trace(**batch):
                pair.append(each.output.logits[0, -1].save())
        found.append(float((pair[0] - pair[1]).abs().max()))
    assert found[1] > 1e-3
    assert found[0] < 1e-4


def test_layers_without_attention_weights_are_named() -> None:
    module, processor = find_family("qwen3_5", name="qwen3_5").random_model()
    hybrid = load_model(module, processor=processor)
    for call in (lambda: attention_contributions(hybrid, CLEAN), lambda: knock_out(hybrid, "image", "last")):
        with pytest.raises(ConfigError, match="without attention weights"):
            call()
