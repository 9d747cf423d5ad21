"""LLaVA-NeXT's hooks: names, synonyms, operations inside of modules, and agreement with TransformerLens's bridge."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.registry import find_family
from sae_lens_multimodal.errors import UnknownHookError
from tests.adapters.adapter_samples import mixed_prompts, picture, prompt


@pytest.fixture(scope="module")
def eager() -> VisionLanguageModel:
    module, processor = find_family("llava_next").random_model(seed=1)
    module.set_attn_implementation("eager")
    return load_model(module, processor=processor)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("blocks.1.hook_out", "blocks.1.hook_resid_post"),
        ("blocks.1.attn.hook_out", "blocks.1.hook_attn_out"),
        ("vision_encoder.encoder_layers.1.hook_out", "vision.blocks.1.hook_resid_post"),
        ("vision_projector.hook_out", "projector.hook_out"),
        ("embed.hook_out", "hook_embed"),
        ("hook_unembed", "unembed.hook_out"),
        ("model.language_model.layers.1", "blocks.1.hook_resid_post"),
        ("model.language_model.layers.1.output", "blocks.1.hook_resid_post"),
        ("model.language_model.layers.1.input", "blocks.1.hook_resid_pre"),
        ("model.language_model.layers.1.self_attn", "blocks.1.hook_attn_out"),
        ("model.language_model.layers.1.post_attention_layernorm.input", "blocks.1.ln2.hook_in"),
        ("model.vision_tower.encoder.layers.0", "vision.blocks.0.hook_resid_post"),
        ("model.multi_modal_projector", "projector.hook_out"),
        ("language_model.model.layers.0", "blocks.0.hook_resid_post"),
        ("vision_tower.vision_model.encoder.layers.1", "vision.blocks.1.hook_resid_post"),
        ("lm_head", "unembed.hook_out"),
    ],
)
def test_synonyms(llava: VisionLanguageModel, name: str, canonical: str) -> None:
    assert llava.hooks.resolve(name).name == canonical


def test_any_module_path_is_a_hook(llava: VisionLanguageModel) -> None:
    path = "model.language_model.layers.0.mlp.act_fn"
    point = llava.hooks.resolve(path)
    assert (point.name, point.tower, point.layer) == (f"{path}.output", "language", None)
    assert llava.hooks.resolve("model.vision_tower.post_layernorm.input").tower == "vision"
    with llava.trace(**llava.encode(prompt("what ?"))):
        value = llava.hooks[path].save()
        heads = llava.hooks["model.language_model.layers.1.self_attn.q_proj"].save()
    assert value.shape[-1] == 64
    assert heads.dim() == 3


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("blocks.1.hook_resid_pots", "blocks.1.hook_resid_post"),
        ("blocks.99.hook_resid_post", "numbered from 0 to 1"),
        ("blocks.x.hook_out", "nearest"),
        ("vision.block.0.hook_resid_post", "vision.blocks.0.hook_resid_post"),
        ("model.language_model.layer.1", "model.language_model.layers.1"),
        ("", "names look like"),
    ],
)
def test_an_unknown_name_lists_the_nearest(llava: VisionLanguageModel, name: str, near: str) -> None:
    with pytest.raises(UnknownHookError, match=near) as caught:
        llava.hooks.resolve(name)
    assert not str(caught.value).startswith('"')


def test_hooks_behave_as_a_container(llava: VisionLanguageModel) -> None:
    assert "blocks.0.hook_resid_post" in llava.hooks
    assert "blocks.9.hook_resid_post" not in llava.hooks
    assert list(llava.hooks) == llava.hooks.names()
    assert len(llava.hooks) == len(llava.hooks.names())


def test_values_inside_of_modules(eager: VisionLanguageModel) -> None:
    """The hooks that are no module's input or output, against the same arithmetic on their neighbours."""
    batch = eager.encode(mixed_prompts())
    names = [name for name in eager.hooks.names() if name.startswith(("blocks.1.", "ln_final", "vision.blocks.1."))]
    got: dict[str, Tensor] = {}
    with torch.no_grad(), eager.trace(**batch):
        for name in names:
            got[name] = eager.hooks[name].save()
    for block in ("blocks.1", "vision.blocks.1"):
        assert torch.equal(got[f"{block}.hook_resid_mid"], got[f"{block}.ln2.hook_in"])
        assert torch.equal(
            got[f"{block}.hook_resid_mid"], got[f"{block}.hook_resid_pre"] + got[f"{block}.hook_attn_out"]
        )
        assert torch.equal(
            got[f"{block}.hook_resid_post"], got[f"{block}.hook_resid_mid"] + got[f"{block}.hook_mlp_out"]
        )
        pattern = got[f"{block}.attn.hook_pattern"]
        assert torch.equal(got[f"{block}.attn.hook_attn_scores"].softmax(-1), pattern)
        value = got[f"{block}.attn.hook_v"].transpose(1, 2)
        value = value.repeat_interleave(pattern.shape[1] // value.shape[1], 1)
        torch.testing.assert_close((pattern @ value).transpose(1, 2), got[f"{block}.attn.hook_z"])
    for norm, weight in (
        ("blocks.1.ln1", eager._module.model.language_model.layers[1].input_layernorm.weight),
        ("blocks.1.ln2", eager._module.model.language_model.layers[1].post_attention_layernorm.weight),
        ("ln_final", eager._module.model.language_model.norm.weight),
    ):
        assert torch.equal(got[f"{norm}.hook_normalized"] * weight, got[f"{norm}.hook_out"])


def test_writing_the_middle_of_the_residual_stream_reaches_both_branches(eager: VisionLanguageModel) -> None:
    batch = eager.encode(mixed_prompts()[:2])
    for block in ("blocks.1", "vision.blocks.0"):
        with torch.no_grad(), eager.trace(**batch):
            read = eager.hooks[f"{block}.hook_resid_mid"].save()
            eager.hooks[f"{block}.hook_resid_mid"] = read * 0 + 0.5
            normed = eager.hooks[f"{block}.ln2.hook_in"].save()
            added = eager.hooks[f"{block}.hook_mlp_out"].save()
            after = eager.hooks[f"{block}.hook_resid_post"].save()
        assert (normed == 0.5).all()
        assert torch.equal(after, 0.5 + added)
        # what was read before the write keeps its value
        assert read.std() > 0


def test_writing_the_attention_pattern_changes_what_is_attended_to(eager: VisionLanguageModel) -> None:
    batch = eager.encode(mixed_prompts()[:2])
    with torch.no_grad(), eager.trace(**batch):
        pattern = eager.hooks["blocks.1.attn.hook_pattern"]
        eager.hooks["blocks.1.attn.hook_pattern"] = torch.eye(pattern.shape[-1]).expand_as(pattern)
        z = eager.hooks["blocks.1.attn.hook_z"].save()
    with torch.no_grad(), eager.trace(**batch):
        v = eager.hooks["blocks.1.attn.hook_v"].save()
    torch.testing.assert_close(z, v.repeat_interleave(2, dim=2))


def test_in_place_changes_count(eager: VisionLanguageModel) -> None:
    batch = eager.encode(mixed_prompts()[:2])
    for name in ("blocks.1.hook_resid_mid", "blocks.0.hook_resid_post", "blocks.1.attn.hook_z"):
        with torch.no_grad(), eager.trace(**batch):
            eager.hooks[name] = eager.hooks[name] * 0
            assigned = eager.output.logits.save()
        with torch.no_grad(), eager.trace(**batch):
            eager.hooks[name][:] = 0
            in_place = eager.output.logits.save()
        assert torch.equal(assigned, in_place), name


def test_a_head_can_be_switched_off(eager: VisionLanguageModel) -> None:
    batch = eager.encode(prompt(picture(60, 50), "what ?"))
    weight = eager._module.model.language_model.layers[1].self_attn.o_proj.weight
    with torch.no_grad(), eager.trace(**batch):
        z = eager.hooks["blocks.1.attn.hook_z"].clone()
        own = (z[:, :, 2].clone() @ weight[:, 24:36].T).save()
        full = (z.flatten(-2) @ weight.T).save()
        z[:, :, 2] = 0
        eager.hooks["blocks.1.attn.hook_z"] = z
        out = eager.hooks["blocks.1.hook_attn_out"].save()
    torch.testing.assert_close(out, full - own, atol=1e-5, rtol=1e-5)


def test_patterns_need_eager_attention(llava: VisionLanguageModel) -> None:
    batch = llava.encode(prompt("what ?"))
    for name in ("blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"):
        with pytest.raises(UnknownHookError, match="attn_implementation='eager'"), llava.trace(**batch):
            llava.hooks[name].save()
    with llava.trace(**batch):
        llava.hooks["blocks.1.attn.hook_z"].save()


def test_gradients_flow_through_hooks(eager: VisionLanguageModel) -> None:
    batch = eager.encode(mixed_prompts()[:1])
    names = ("vision.blocks.0.hook_resid_post", "projector.hook_out", "blocks.0.hook_resid_mid", "blocks.1.attn.hook_z")
    for name in names:
        with eager.trace(**batch):
            value = eager.hooks[name]
            # an encoder-like function of the value itself, written back
            eager.hooks[name] = value + (value * value).relu() * 0.01
            loss = eager.output.logits[:, -1].logsumexp(-1).sum()
            with loss.backward():
                gradient = value.grad.save()
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


@pytest.fixture(scope="module")
def bridge_cache(eager: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Everything TransformerLens's bridge sees of one prompt with the same weights, in eager attention.

    The bridge normalises the vision tower with the language model's epsilon, so the random model has one for both.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.generalized_components import position_embeddings_attention
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bridge")
    module, processor = find_family("llava_next").random_model(seed=1)
    module.set_attn_implementation("eager")
    processor.save_pretrained(folder)
    module.config.save_pretrained(folder)
    batch = eager.encode(prompt(picture(100, 60), "is there a red circle ?"))
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        # the bridge warns about aliases of its own vision blocks
        warnings.simplefilter("ignore")
        # and would change Gemma's attention, which other tests look into, for as long as the process lives
        patch.setattr(position_embeddings_attention, "_EAGER_ATTENTION_WRAPPED", True)
        bridge = TransformerBridge.boot_transformers(
            str(folder), hf_model=copy.deepcopy(module), tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu"
        )
        with torch.no_grad():
            _, cache = bridge.run_with_cache(
                batch["input_ids"],
                attention_mask=batch["attention_mask"],
                pixel_values=batch["pixel_values"],
                image_sizes=batch["image_sizes"],
            )
    return batch, cache


def test_values_are_those_of_the_bridge(eager: VisionLanguageModel, bridge_cache: tuple[Any, Any]) -> None:
    batch, cache = bridge_cache
    got: dict[str, Tensor] = {}
    with torch.no_grad(), eager.trace(**batch):
        for name in eager.hooks.names():
            got[name] = eager.hooks[name].save()
    ours = {name for name in eager.hooks.names() if not name.startswith(("vision", "projector"))}
    shared = [name for name in cache if name in ours]
    # every hook of ours in the language model is one of the bridge's, by that very name
    assert ours == set(shared)
    pairs = {name: cache[name] for name in shared}
    for theirs in cache:
        if theirs.startswith(("vision_encoder.encoder_layers", "vision_projector.hook_")):
            try:
                pairs[eager.hooks.resolve(theirs).name] = cache[theirs]
            except UnknownHookError:
                assert "hook_vision" in theirs
    assert sum(name.startswith("vision") for name in pairs) == 2 * 2
    for name, value in pairs.items():
        if name.endswith("hook_attn_scores"):
            # each side masks with a very negative number of its own
            seen = value > -1e4
            torch.testing.assert_close(got[name][seen], value[seen], atol=1e-4, rtol=1e-4)
            continue
        assert got[name].shape == value.shape, name
        torch.testing.assert_close(got[name], value, atol=1e-4, rtol=1e-4, msg=name)


def test_only_a_folder_is_needed(tmp_path: Path, eager: VisionLanguageModel) -> None:
    module, processor = find_family("llava_next").random_model(seed=1)
    module.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, attn_implementation="eager")
    batch = eager.encode(mixed_prompts())
    again = loaded.encode(mixed_prompts())
    assert set(batch) == set(again)
    for name in batch:
        assert torch.equal(batch[name], again[name])
    with torch.no_grad():
        with loaded.trace(**again):
            theirs = loaded.hooks["blocks.1.attn.hook_pattern"].save()
        with eager.trace(**batch):
            ours = eager.hooks["blocks.1.attn.hook_pattern"].save()
    assert torch.equal(ours, theirs)
