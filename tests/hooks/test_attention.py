"""Contributions add up to what attention gives, and knocked out attention is what a mask of one's own gives."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.random_models import random_llava_next
from sae_lens_multimodal.errors import ConfigError, SelectionError, UnsupportedModelError
from sae_lens_multimodal.hooks.attention import attention_contributions
from sae_lens_multimodal.hooks.attention_knockout import attention_call, knock_out
from sae_lens_multimodal.hooks.changes import Add
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.steer import steer
from tests.hooks.hook_samples import SAE
from tests.hooks.trace_samples import ask, plain_logits

PROMPT = ask((200, 10, 10))


@pytest.fixture(scope="module")
def eager() -> VisionLanguageModel:
    module, processor = random_llava_next()
    module.set_attn_implementation("eager")
    for layer in module.model.language_model.layers:
        projection = layer.self_attn.o_proj
        projection.bias = torch.nn.Parameter(torch.linspace(-1, 1, 48))
    return load_model(module, processor=processor)


def test_contributions_and_bias_add_up_to_the_attention_output(
    model: VisionLanguageModel, eager: VisionLanguageModel
) -> None:
    for one in (model, eager):
        found = attention_contributions(one, PROMPT, targets="all")
        names = ["blocks.0.hook_attn_out", "blocks.1.hook_attn_out"]
        values = read_activations(one, one.encode(PROMPT, add_generation_prompt=True), names)
        for layer, name in enumerate(names):
            assert torch.allclose(found.total()[layer], values[name][0], atol=1e-5)
    assert model._module.config.text_config._attn_implementation == "sdpa"
    assert found.parts[0].bias is not None


def test_of_the_weights_only_the_targets_rows_are_kept(eager: VisionLanguageModel) -> None:
    found = attention_contributions(eager, PROMPT)
    length = len(found.tokens)
    assert [part.weights.untyped_storage().nbytes() for part in found.parts] == [4 * length * 4] * 2
    assert torch.allclose(
        found.by_head()[:, :, -1], attention_contributions(eager, PROMPT, targets="all").by_head()[:, :, -1]
    )


def test_each_contribution_is_worked_out_as_by_hand(eager: VisionLanguageModel) -> None:
    found = attention_contributions(eager, PROMPT, targets=[-4, -1], sources="text")
    batch = eager.encode(PROMPT, add_generation_prompt=True)
    names = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_v"]
    values = read_activations(eager, batch, names)
    weight = eager._module.model.language_model.layers[1].self_attn.o_proj.weight
    target, source = found.targets[1], found.sources[2]
    whole = torch.zeros(48)
    for head in range(4):
        share = float(values[names[0]][0, head, target, source])
        # two heads share each key head
        vector = weight[:, head * 12 : head * 12 + 12] @ values[names[1]][0, source, head // 2] * share
        assert float(found.by_head()[1, head, 1, 2]) == pytest.approx(float(vector.detach().norm()), rel=1e-4)
        assert float(found.along(torch.ones(48))[1, head, 1, 2]) == pytest.approx(
            float(vector.detach().sum()), rel=1e-3
        )
        assert float(found.attention()[1, head, 1, 2]) == pytest.approx(share, rel=1e-5)
        whole += vector.detach()
    assert float(found.by_source()[1, 1, 2]) == pytest.approx(float(whole.norm()), rel=1e-4)
    joined = found.by_region({"one": [source]})["one"]
    assert float(joined[1, 1]) == pytest.approx(float(whole.norm()), rel=1e-4)


def test_a_source_without_a_value_gives_nothing_however_much_it_draws() -> None:
    module, processor = random_llava_next()
    built = load_model(module, processor=processor)
    batch = built.encode(PROMPT, add_generation_prompt=True)
    sink = 0
    attention = module.model.language_model.layers[0].self_attn

    def no_value(_: Any, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, sink] = 0
        return output

    def drawing(_: Any, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, sink] *= 40
        return output

    with ExitStack() as stack:
        stack.callback(attention.v_proj.register_forward_hook(no_value).remove)
        stack.callback(attention.k_proj.register_forward_hook(drawing).remove)
        found = attention_contributions(built, batch, targets="all", layers=[0])
    assert float(found.attention()[0, :, :, sink].max()) > 0.99
    assert not found.by_head()[0, :, :, sink].any()
    assert not found.by_source()[0, :, sink].any()
    assert not found.by_region({"sink": [sink]})["sink"].any()


def test_contributions_by_region_lie_on_the_picture(model: VisionLanguageModel) -> None:
    found = attention_contributions(model, PROMPT)
    layout = found.layout
    corner = layout.tokens_in((0, 0, 20, 20))
    rest = layout.tokens_in((30, 0, 60, 40))
    by_region = found.by_region({"corner": corner, "rest": rest})
    assert by_region["corner"].shape == (2, 1)
    both = found.vectors(torch.cat([corner, rest]))
    assert torch.allclose(found.vectors(corner) + found.vectors(rest), both, atol=1e-5)
    assert found.heatmap(1).shape == (40, 60)
    assert found.heatmap(1, head=2).max() > 0
    with pytest.raises(SelectionError, match="none of which is a source"):
        attention_contributions(model, PROMPT, sources="text").by_region({"corner": corner})
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        attention_contributions(model, PROMPT, layers=[2])


def _masked(model: VisionLanguageModel, batch: EncodedBatch, forbidden: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Logits where plain PyTorch hooks put a mask of one's own before the attention of some layers."""
    length = forbidden.shape[-1]
    closed = forbidden | torch.ones(length, length, dtype=torch.bool).triu(1)
    padded = batch["attention_mask"] == 0
    mask = (closed | padded[:, None, None]).float() * torch.finfo(torch.float32).min
    with ExitStack() as stack:
        for layer in layers:
            module = model._module.model.language_model.layers[layer].self_attn

            def before(_: Any, args: Any, kwargs: Any) -> Any:
                return args, {**kwargs, "attention_mask": mask}

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        with torch.no_grad():
            return model._module(**batch).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_knocked_out_attention_is_what_a_mask_gives(
    implementation: str, layers: tuple[int, ...], conversations: list[Any], model: VisionLanguageModel
) -> None:
    one = model
    if implementation == "eager":
        module, processor = random_llava_next()
        module.set_attn_implementation("eager")
        one = load_model(module, processor=processor)
    batch = one.encode(conversations, add_generation_prompt=True)
    edited = knock_out(one, "image", "last", layers=layers)
    with torch.no_grad(), edited.trace(**batch):
        logits = edited.output.logits.save()
    last = torch.zeros_like(batch.layout.is_image)
    last[:, -1] = True
    forbidden = (last[:, :, None] & batch.layout.is_image[:, None])[:, None]
    real = batch["attention_mask"] != 0
    assert torch.allclose(logits[real], _masked(one, batch, forbidden, layers)[real], atol=1e-5)
    with torch.no_grad():
        plain = one._module(**batch).logits
    assert torch.equal(logits[:, :-1][real[:, :-1]], plain[:, :-1][real[:, :-1]]) or implementation == "sdpa"
    changed = (logits[:, -1] - plain[:, -1]).abs().amax(-1)
    assert (changed > 1e-3).tolist() == [True, False, True]


def test_single_heads_are_knocked_out(model: VisionLanguageModel) -> None:
    batch = model.encode(PROMPT, add_generation_prompt=True)
    edited = knock_out(model, "image", "last", layers=[1], heads=[2])
    names = ["blocks.1.attn.hook_z"]
    one, two = (read_activations(each, batch, names)[names[0]] for each in (model, edited))
    different = (one - two).abs().amax(-1)[0] > 1e-4
    expected = torch.zeros_like(different)
    expected[-1, 2] = True
    assert torch.equal(different, expected)


def test_the_knockout_holds_while_decoding_with_and_without_a_cache(model: VisionLanguageModel) -> None:
    batch = model.encode(PROMPT, add_generation_prompt=True)
    edited = knock_out(model, "image", "last")
    answers = [
        edited.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(answers[0], answers[1])
    text = batch["input_ids"]
    length = text.shape[1]
    for _ in range(6):
        n = text.shape[1]
        inputs = {**batch.inputs, "input_ids": text, "attention_mask": torch.ones_like(text)}
        inputs["position_ids"] = torch.arange(n)[None]
        targets = torch.zeros(n, dtype=torch.bool)
        targets[length - 1 :] = True
        image = torch.nn.functional.pad(batch.layout.is_image, (0, n - length))
        forbidden = (targets[None, :, None] & image[:, None])[:, None]
        grown = EncodedBatch(inputs=inputs, layout=batch.layout, images=batch.images)
        text = torch.cat([text, _masked(model, grown, forbidden, (0, 1))[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answers[0], text)
    assert not torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), text)


def test_generated_tokens_can_be_sources_too(model: VisionLanguageModel) -> None:
    batch = model.encode(PROMPT, add_generation_prompt=True)
    edited = knock_out(model, "text", lambda layout: layout.is_text, steps="decoding")
    with pytest.raises(SelectionError, match="nothing to attend to"):
        knock_out(model, "all", "last").generate(**batch, max_new_tokens=2, do_sample=False)
    answers = [
        edited.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(answers[0], answers[1])


def test_a_knocked_out_model_is_steered_further(model: VisionLanguageModel, sae: SAE[Any], active: list[int]) -> None:
    batch = model.encode(PROMPT, add_generation_prompt=True)
    both = steer(knock_out(model, "image", "last"), sae, {active[0]: Add(9.0)})
    other = knock_out(steer(model, sae, {active[0]: Add(9.0)}), "image", "last")
    single = steer(model, sae, {active[0]: Add(9.0)})
    found = []
    for each in (both, other, single):
        with torch.no_grad(), each.trace(**batch):
            found.append(each.output.logits.save())
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-3)
    assert torch.equal(plain_logits(model, batch), plain_logits(model, batch))


def test_what_cannot_be_knocked_out_is_refused(model: VisionLanguageModel) -> None:
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        knock_out(model, "image", "last", layers=[4])
    with pytest.raises(ConfigError, match="heads 0 to 3"):
        knock_out(model, "image", "last", heads=[4])
    with pytest.raises(UnsupportedModelError, match="does not call"):
        attention_call(model, "lm_head")


def test_a_model_without_an_adapter_is_taken_apart_and_knocked_out_alike(model: VisionLanguageModel) -> None:
    module, processor = random_llava_next()
    generic = load_model(module, processor=processor, family="generic")
    found = []
    for one in (model, generic):
        batch = one.encode(PROMPT, add_generation_prompt=True)
        # what is a picture's, newlines among it, is all that is known without an adapter
        edited = knock_out(one, list(range(5, 40)), "last", layers=[1])
        with torch.no_grad(), edited.trace(**batch):
            logits = edited.output.logits.save()
        found.append((logits[0, -1], attention_contributions(one, PROMPT).by_source()))
    for exact, structural in zip(*found, strict=True):
        assert torch.allclose(exact, structural, atol=1e-5)
