"""Blocks with norms after attention and MLP name what is added to the residual stream as those without do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.registry import find_family
from tests.adapters.adapter_samples import mixed_prompts

WITH_POST_NORMS = ["gemma3", "paligemma"]


def read(name: str) -> tuple[VisionLanguageModel, dict[str, Tensor]]:
    module, processor = find_family(name).random_model(seed=2)
    module.set_attn_implementation("eager")
    model = load_model(module, processor=processor)
    got: dict[str, Tensor] = {}
    with torch.no_grad(), model.trace(**model.encode(mixed_prompts()[:2])):
        for hook in model.hooks.names():
            got[hook] = model.hooks[hook].save()
    return model, got


@pytest.mark.parametrize("name", WITH_POST_NORMS)
def test_norms_after_attention_and_mlp(name: str) -> None:
    model, got = read(name)
    block: Any = model._module.model.language_model.layers[1]
    for own, norm, hook, module in (
        ("attn.hook_out", "ln1_post", "hook_attn_out", block.post_attention_layernorm),
        ("mlp.hook_out", "ln2_post", "hook_mlp_out", block.post_feedforward_layernorm),
    ):
        before, added = got[f"blocks.1.{own}"], got[f"blocks.1.{hook}"]
        with torch.no_grad():
            assert torch.equal(module(before), added)
        assert not torch.allclose(before, added)
        assert torch.equal(got[f"blocks.1.{norm}.hook_normalized"] * (1 + module.weight), added)
        assert model.hooks.resolve(f"blocks.1.{norm}.hook_out").name == f"blocks.1.{hook}"
    assert model.hooks.resolve("blocks.1.attn.o.hook_out").name == "blocks.1.attn.hook_out"
    assert model.hooks.resolve("blocks.1.mlp.out.hook_out").name == "blocks.1.mlp.hook_out"
    assert model.hooks.resolve("model.language_model.layers.1.self_attn").name == "blocks.1.attn.hook_out"
    weight = block.self_attn.o_proj.weight
    torch.testing.assert_close(
        got["blocks.1.attn.hook_z"].flatten(-2) @ weight.T, got["blocks.1.attn.hook_out"], atol=1e-5, rtol=1e-4
    )


def test_without_them_the_modules_own_output_is_what_is_added() -> None:
    model, _ = read("llava")
    assert model.hooks.resolve("blocks.1.attn.o.hook_out").name == "blocks.1.hook_attn_out"
    assert "blocks.1.attn.hook_out" not in model.hooks
