"""What is knocked out, ablated, traced and taken apart is the same whatever computes attention."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.encode import special_ids
from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.registry import find_family
from sae_lens_multimodal.errors import ConfigError, SelectionError, UnsupportedModelError
from sae_lens_multimodal.hooks.attention import attention_contributions
from sae_lens_multimodal.hooks.attention_calls import AttentionCall
from sae_lens_multimodal.hooks.attention_knockout import knock_out
from sae_lens_multimodal.hooks.lens import logit_lens
from sae_lens_multimodal.hooks.trace import causal_trace
from sae_lens_multimodal.hooks.trace_ablation import ablate_tokens
from sae_lens_multimodal.hooks.trace_run import BlockRunner
from tests.hooks import attention_samples
from tests.hooks.attention_samples import HUB_KERNEL, IMPLEMENTATIONS, MASKED_KERNEL, attention
from tests.hooks.trace_samples import ask

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
"""PyTorch's own, where flex attention is first used."""

FAMILIES = ("llava_next", "qwen2_5_vl", "qwen3_vl", "glm4v", "aya_vision", "mistral3", "gemma3", "paligemma")
"""Plain masks, positions of three kinds, windows, padding on the right, pictures and prompts that look ahead."""
WITHOUT = {"paligemma": ("sdpa", MASKED_KERNEL)}
"""What transformers refuses: sdpa where scores are capped."""
CAUSAL_IN_FLASH = "gemma3"
"""Where transformers' flash attention knows nothing of a picture's tokens looking ahead, unlike all others."""
PAIRS = [(family, name) for family in FAMILIES for name in IMPLEMENTATIONS if name not in WITHOUT.get(family, ())]
PROMPTS = [ask((200, 10, 10)), ask((1, 90, 10), "a red circle and a blue square ?", (90, 40))]


@pytest.fixture(scope="module")
def models() -> dict[str, VisionLanguageModel]:
    found = {}
    for family in FAMILIES:
        module, processor = find_family(family, name=family).random_model()
        found[family] = load_model(module, processor=processor)
    return found


def _blocks(model: VisionLanguageModel) -> list[nn.Module]:
    paths = [model.hooks.resolve(f"blocks.{layer}.attn.hook_in").module_path for layer in range(model.n_layers)]
    return [model._module.get_submodule(path) for path in paths]


def _plain(
    model: VisionLanguageModel, batch: EncodedBatch, closed: Tensor, layers: tuple[int, ...], *, ahead: bool = True
) -> Tensor:
    """Logits of eager attention whose own mask is closed by plain PyTorch hooks; or a causal one with windows."""
    length = closed.shape[-1]
    places = torch.arange(length)
    with ExitStack() as stack:
        stack.enter_context(attention(model, "eager"))
        for layer, module in enumerate(_blocks(model)):

            def before(own: Any, args: Any, kwargs: Any, layer: int = layer) -> Any:
                mask = kwargs["attention_mask"].clone()
                if not ahead:
                    distance = places[:, None] - places[None]
                    seen = (distance >= 0) & (distance < (own.sliding_window or length))
                    seen = seen & (batch["attention_mask"] != 0)[:, None, None]
                    mask = (~seen).float() * torch.finfo(torch.float32).min
                if layer in layers:
                    mask = mask.masked_fill(closed[:, None], torch.finfo(torch.float32).min)
                return args, {**kwargs, "attention_mask": mask}

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        with torch.no_grad():
            found: Tensor = model._module(**batch).logits
    return found


def _closed(batch: EncodedBatch) -> Tensor:
    """Every text token after a picture, and the picture before it."""
    later = batch.layout.is_text & (batch.layout.is_image.cumsum(-1) > 0)
    return later[:, :, None] & batch.layout.is_image[:, None]


def _later(layout: Any) -> Tensor:
    later: Tensor = layout.is_text & (layout.is_image.cumsum(-1) > 0)
    return later


def _logits(model: VisionLanguageModel, batch: EncodedBatch) -> Tensor:
    with torch.no_grad(), model.trace(**batch):
        logits = model.output.logits.save()
    found: Tensor = logits
    return found


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_the_mask_is_the_models_own_less_what_is_knocked_out(
    family: str, name: str, models: dict[str, VisionLanguageModel]
) -> None:
    model = models[family]
    batch = model.encode(PROMPTS, add_generation_prompt=True)
    real = batch["attention_mask"] != 0
    assert not real.all()
    ahead = not (family == CAUSAL_IN_FLASH and "flash" in name)
    for layers in ((0,), (0, 1)):
        expected = _plain(model, batch, _closed(batch), layers, ahead=ahead)[real]
        untouched = _plain(model, batch, torch.zeros_like(_closed(batch)), layers, ahead=ahead)[real]
        with attention(model, name):
            found = _logits(knock_out(model, "image", _later, layers=layers), batch)[real]
            plain = _logits(model, batch)[real]
        assert torch.allclose(found, expected, atol=2e-5)
        assert torch.allclose(plain, untouched, atol=2e-5)
        assert float((expected - untouched).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("family", "name"), [pair for pair in PAIRS if pair[0] in ("llava_next", "gemma3", "qwen3_vl")]
)
def test_it_holds_while_decoding_with_a_cache(family: str, name: str, models: dict[str, VisionLanguageModel]) -> None:
    """The cached passes give what one pass over the whole text gives by plain hooks."""
    model = models[family]
    batch = model.encode(PROMPTS, add_generation_prompt=True)
    control = [*special_ids(model.tokenizer), model.family.image_token_id]
    with attention(model, name):
        edited = knock_out(model, "image", lambda layout: layout.is_text)
        given = edited.generate(
            **batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=control,
        )  # fmt: skip
    length = batch.layout.n_tokens
    text = given.sequences[:, :-1]
    more = text.shape[1] - length
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, more), value=1)
    inputs = {**batch.inputs, "input_ids": text, "attention_mask": mask}
    for key in model.family.token_keys:
        if key in inputs:
            inputs[key] = torch.nn.functional.pad(inputs[key], (0, more))
    positions = model.family.positions(inputs)
    whole = EncodedBatch(
        inputs=inputs if positions is None else {**inputs, "position_ids": positions},
        layout=batch.layout,
        images=batch.images,
    )
    targets = torch.nn.functional.pad(batch.layout.is_text, (0, more), value=True)
    image = torch.nn.functional.pad(batch.layout.is_image, (0, more))
    ahead = not (family == CAUSAL_IN_FLASH and "flash" in name)
    expected = _plain(model, whole, targets[:, :, None] & image[:, None], tuple(range(model.n_layers)), ahead=ahead)
    found = torch.stack(given.logits, dim=1)
    assert torch.allclose(found, expected[:, length - 1 :], atol=5e-5)
    untouched = _plain(model, whole, torch.zeros_like(targets[:, :, None] & image[:, None]), (), ahead=ahead)
    assert float((found - untouched[:, length - 1 :]).abs().max()) > 1e-2


# transformers itself does not run flex attention with a static cache
@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", MASKED_KERNEL])
def test_it_holds_with_a_cache_that_has_room_to_spare(name: str, models: dict[str, VisionLanguageModel]) -> None:
    model = models["llava_next"]
    batch = model.encode(PROMPTS, add_generation_prompt=True)
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = []
    with attention(model, name):
        edited = knock_out(model, "image", "last")
        for cache in ("dynamic", "static"):
            given = edited.generate(**batch, **settings, cache_implementation=cache, disable_compile=True)
            found.append(torch.stack(given.logits))
    assert torch.allclose(found[0], found[1], atol=2e-5)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_other_layers_keep_their_own_attention(
    name: str, models: dict[str, VisionLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["llava_next"]
    batch = model.encode(PROMPTS, add_generation_prompt=True)
    called: list[int] = []
    own = ALL_ATTENTION_FUNCTIONS[name]

    def counting(module: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(module.layer_idx)
        return own(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, counting)
    with attention(model, name):
        edited = knock_out(model, "image", "last", layers=[1])
        given = edited.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert given.shape[1] == batch.layout.n_tokens + 3
    # layer 1 once more in the pass over the prompt, where what its mask means is checked
    assert called == [0, 1, 0, 0]
    called.clear()
    with attention(model, name):
        edited = knock_out(model, "image", "last", layers=[1], steps="decoding")
        edited.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert called == [0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_knockouts_follow_one_another_and_take_single_heads(name: str, models: dict[str, VisionLanguageModel]) -> None:
    model = models["llava_next"]
    batch = model.encode(PROMPTS, add_generation_prompt=True)
    real = batch["attention_mask"] != 0
    last = torch.zeros_like(batch.layout.is_image)
    last[:, -1] = True
    words = batch.layout.is_text & ~last
    closed = (last[:, :, None] & batch.layout.is_image[:, None]) | (last[:, :, None] & words[:, None])
    expected = _plain(model, batch, closed, (1,))[real]
    with attention(model, name):
        both = knock_out(knock_out(model, "image", "last", layers=[1]), lambda _: words, "last", layers=[1])
        found = _logits(both, batch)[real]
        every = _logits(knock_out(model, "image", "last", layers=[1], heads=[0, 1, 2, 3]), batch)[real]
        one = _logits(knock_out(model, "image", "last", layers=[1], heads=[2]), batch)[real]
        whole = _logits(knock_out(model, "image", "last", layers=[1]), batch)[real]
    with attention(model, "eager"):
        reference = _logits(knock_out(model, "image", "last", layers=[1], heads=[2]), batch)[real]
    assert torch.allclose(found, expected, atol=2e-5)
    assert torch.allclose(every, whole, atol=2e-5)
    assert torch.allclose(one, reference, atol=2e-5)
    assert float((one - whole).abs().max()) > 1e-3


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nothing_stays_behind_also_after_an_exception(name: str, models: dict[str, VisionLanguageModel]) -> None:
    model = models["llava_next"]
    config = model._module.config.text_config
    batch = model.encode(PROMPTS, add_generation_prompt=True)
    with attention(model, name):
        before = _logits(model, batch), dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)
        with pytest.raises(SelectionError, match="nothing to attend to"):
            _logits(knock_out(model, "all", "last", layers=[1]), batch)
        module = _blocks(model)[1]
        edited = knock_out(model, "image", "last")
        handle = module.o_proj.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            _logits(edited, batch)
        handle.remove()
        assert config._attn_implementation == name
        assert all(block.config is config for block in _blocks(model))
        after = _logits(model, batch), dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def _fail(*_: object) -> None:
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2", HUB_KERNEL, MASKED_KERNEL])
@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
def test_traces_contributions_ablations_and_lens_are_those_of_eager_attention(
    family: str, name: str, models: dict[str, VisionLanguageModel]
) -> None:
    model = models[family]
    clean, corrupted = ask((200, 10, 10)), ask((10, 200, 60))
    batch = model.encode(PROMPTS, add_generation_prompt=True)
    real = batch["attention_mask"] != 0
    found: list[Any] = []
    for each in ("eager", name):
        with attention(model, each):
            trace = causal_trace(
                model, clean, corrupted, answer=7, against=3, parts=("resid", "attn_out", "mlp_out", "heads"),
                positions="image", metric="logit_difference", min_gap=None,
            )  # fmt: skip
            found.append(
                (
                    trace.values["logit_difference"],
                    attention_contributions(model, clean).by_head(),
                    _logits(ablate_tokens(model, "image"), batch)[real],
                    logit_lens(model, clean).top_probability,
                )
            )
            assert model._module.config.get_text_config()._attn_implementation == each
    for eager, own in zip(*found, strict=True):
        assert torch.allclose(eager, own, atol=3e-5)
    assert float(found[0][0].std()) > 1e-4


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flex_attention"])
def test_a_padded_prompt_goes_on_in_many_rows(name: str, models: dict[str, VisionLanguageModel]) -> None:
    """Flash attention is given one row's padding for passes of many rows."""
    model = models["llava_next"]
    batch = model.encode([PROMPTS[1], [{"role": "user", "content": "a red circle ?"}]], add_generation_prompt=True)
    row = {"input_ids": batch["input_ids"][1:], "attention_mask": batch["attention_mask"][1:]}
    assert not bool((row["attention_mask"] != 0).all())
    with attention(model, name):
        runner = BlockRunner(model)
        recording = runner.record(EncodedBatch(inputs=row, layout=batch.layout, images=batch.images))
        keys = runner.keys_of(recording)
        hidden = recording.calls[1].hidden.repeat(3, 1, 1)
        hidden[2, -4] += 1
        found = runner.go_on(recording, 1, hidden, keys=None)
        alone = torch.cat([runner.go_on(recording, 1, one[None]) for one in hidden])
    assert torch.allclose(found[0], recording.logits, atol=1e-5)
    assert torch.allclose(found, alone, atol=1e-5)
    assert float((found[2] - found[0]).abs().max()) > 1e-3
    assert (keys is None) == (name == "flash_attention_2")


def test_a_prompt_that_looks_ahead_is_run_whole_in_flash_attention(models: dict[str, VisionLanguageModel]) -> None:
    """Without a mask its attention says by itself that it is not causal."""
    model = models["paligemma"]
    clean, corrupted = ask((200, 10, 10)), ask((10, 200, 60))
    found = []
    for name in ("eager", "flash_attention_2"):
        with attention(model, name):
            trace = causal_trace(
                model, clean, corrupted, answer=7, against=3, parts="attn_out", positions=[2, 5, -1],
                metric="logit_difference", min_gap=None,
            )  # fmt: skip
            found.append(trace.values["logit_difference"])
    assert torch.allclose(*found, atol=1e-4)
    assert float(found[0].std()) > 1e-4


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flex_attention"])
def test_of_layers_of_two_kinds_those_with_attention_are_knocked_out(name: str) -> None:
    """Qwen3.5 gates what attention gives; linear attention in other layers stays as it is."""
    module, processor = find_family("qwen3_5", name="qwen3_5").random_model()
    model = load_model(module, processor=processor)
    batch = model.encode(PROMPTS, add_generation_prompt=True)
    real = batch["attention_mask"] != 0
    own = module.model.language_model.layers[1].self_attn

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        closed = _closed(batch)[:, None]
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"].masked_fill(closed, -3e38)}

    handle = own.register_forward_pre_hook(before, with_kwargs=True)
    with attention(model, "eager"):
        expected = _logits(model, batch)[real]
    handle.remove()
    with attention(model, name):
        found = _logits(knock_out(model, "image", _later, layers=[1]), batch)[real]
        untouched = _logits(model, batch)[real]
    assert torch.allclose(found, expected, atol=2e-5)
    assert float((found - untouched).abs().max()) > 1e-3


def test_attention_that_does_something_else_is_refused(
    models: dict[str, VisionLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["llava_next"]
    batch = model.encode(PROMPTS, add_generation_prompt=True)

    def looking_ahead(module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **kwargs: Any) -> Any:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **{**kwargs, "is_causal": False})

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "own/unknown", looking_ahead)
    monkeypatch.setattr(model._module.config.text_config, "_attn_implementation", "own/unknown")
    with pytest.raises(UnsupportedModelError, match=r"own/unknown.*off by"):
        _logits(knock_out(model, "image", "last"), batch)


def test_continuous_batching_is_refused() -> None:
    value = torch.zeros(1, 1, 2, 4)
    call = AttentionCall((nn.Linear(2, 2), value, value, value, None), {"cache": object()})
    with pytest.raises(ConfigError, match="continuous batching"):
        call.visible()


def test_the_stand_in_for_flash_attention_is_attention() -> None:
    """Causal from the last key, with a window, against PyTorch's attention under a mask written out."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, heads, 8, generator=generator) for n, heads in ((3, 4), (6, 2), (6, 2)))
    distance = (torch.arange(3)[:, None] + 3) - torch.arange(6)[None]
    mask = (distance >= 0) & (distance < 3)
    found = attention_samples.flash_attn_func(q, k, v, causal=True, window_size=(2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)
