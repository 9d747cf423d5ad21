"""Steering equals what a hand-written PyTorch hook does, bit for bit, and leaves everything else alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.encode import special_ids
from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.random_models import random_llava_next
from sae_lens_multimodal.errors import ConfigError, FeatureError, SAEMismatchError, SelectionError, UnknownHookError
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.steer import Ablate, Add, Scale, Set, steer, steer_tokens
from sae_lens_multimodal.types import Modality
from tests.hooks.hook_samples import HOOK, MODULE, build_sae

Conversations = list[list[dict[str, Any]]]
GREEDY = {
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "do_sample": False,
    "output_scores": True,
    "return_dict_in_generate": True,
}


def changed(z: Tensor, active: list[int]) -> Tensor:
    """The changes of `strong`, written out."""
    new = z.clone()
    new[:, active[0]] = 8.0
    new[:, active[1]] = 0.0
    new[:, active[2]] = 2.0 * z[:, active[2]]
    return new


@pytest.fixture(scope="module")
def strong(active: list[int]) -> dict[int, Any]:
    return {active[0]: Set(8.0), active[1]: Ablate(), active[2]: Scale(2.0)}


@contextmanager
def hooked(
    model: VisionLanguageModel, sae: SAE[Any], active: list[int], masks: Callable[[int, Tensor], Tensor | None]
) -> Iterator[None]:
    """A plain PyTorch hook that does the same: `masks` gives the positions of each forward pass."""
    step = -1

    def hook(_: object, __: object, output: Tensor) -> Tensor:
        nonlocal step
        step += 1
        mask = masks(step, output)
        if mask is None:
            return output
        z = sae.encode(output[mask])
        new = output.clone()
        features = active[:3]
        new[mask] = output[mask] + (changed(z, active) - z)[:, features] @ sae.W_dec[features]
        return new

    handle = model._module.get_submodule(MODULE).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def scores(output: Any) -> Tensor:
    return torch.stack(output.scores)


def masks_of(batch: EncodedBatch, tokens: str) -> Tensor:
    attended = batch["attention_mask"] != 0
    match tokens:
        case "image":
            return batch.layout.is_image
        case "text":
            return batch.layout.is_text
        case "last":
            last = torch.zeros_like(attended)
            last[:, -1] = True
            return last
        case _:
            return attended


@pytest.mark.parametrize("tokens", ["all", "image", "text", "last"])
def test_prefill_is_that_of_a_plain_hook_bit_for_bit(
    tokens: Any,
    model: VisionLanguageModel,
    sae: SAE[Any],
    batch: EncodedBatch,
    active: list[int],
    strong: dict[int, Any],
) -> None:
    steered = steer(model, sae, strong, tokens=tokens)
    mask = masks_of(batch, tokens)
    with torch.no_grad():
        with hooked(model, sae, active, lambda step, output: mask):
            expected = model._module(**batch).logits
        with steered.trace(**batch):
            found = steered.output.logits.save()
        assert torch.equal(found, expected)
        before = read_activations(model, batch, HOOK)[HOOK]
    after = read_activations(steered, batch, HOOK)[HOOK]
    assert torch.equal((before != after).any(-1), mask)


def step_mask(batch: EncodedBatch, tokens: str, steps: str) -> Callable[[int, Tensor], Tensor | None]:
    """The positions that a named choice means in each pass of a generation."""

    def mask(step: int, output: Tensor) -> Tensor | None:
        if (steps == "prefill" and step) or (steps == "decoding" and not step):
            return None
        if not step:
            return masks_of(batch, tokens)
        return None if tokens == "image" else torch.ones(output.shape[:2], dtype=torch.bool)

    return mask


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [("all", "all"), ("all", "prefill"), ("all", "decoding"), ("image", "all"), ("last", "all"), ("last", "decoding")],
)
def test_generation_is_that_of_a_plain_hook_bit_for_bit(
    tokens: Any,
    steps: Any,
    model: VisionLanguageModel,
    sae: SAE[Any],
    batch: EncodedBatch,
    active: list[int],
    strong: dict[int, Any],
) -> None:
    steered = steer(model, sae, strong, tokens=tokens, steps=steps)
    with torch.no_grad(), hooked(model, sae, active, step_mask(batch, tokens, steps)):
        expected = model._module.generate(**batch, **GREEDY)
    found = steered.generate(**batch, **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(scores(found), scores(expected))
    plain = model.generate(**batch, **GREEDY)
    same = [torch.equal(one, other) for one, other in zip(found.scores, plain.scores, strict=True)]
    assert same[0] == (steps == "decoding")
    assert not all(same)


def at_first(layout: TokenLayout) -> Tensor:
    """The first position of a pass, and all image tokens."""
    mask = layout.is_image.clone()
    mask[:, 0] = True
    return mask


@pytest.mark.parametrize("steps", ["all", "prefill"])
@pytest.mark.parametrize("tokens", ["all", "image", "text", "last", "mask", [-1, -3], at_first])
def test_generation_without_a_cache_is_steered_as_with_one(
    tokens: Any, steps: Any, model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, strong: dict[int, Any]
) -> None:
    chosen = batch.layout.is_image if isinstance(tokens, str) and tokens == "mask" else tokens
    steered = steer(model, sae, strong, tokens=chosen, steps=steps)
    # Placeholders that the random model generates would be taken for the prompt's when they are read again.
    settings = {**GREEDY, "suppress_tokens": [model.family.image_token_id]}
    cached, again = (steered.generate(**batch, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(again.sequences, cached.sequences)
    assert torch.allclose(scores(again), scores(cached), atol=1e-5)
    plain = model.generate(**batch, **settings, use_cache=False)
    assert not torch.allclose(scores(again), scores(plain), atol=1e-3)


def test_decoding_without_a_cache_leaves_the_prompt_alone(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, strong: dict[int, Any]
) -> None:
    steered = steer(model, sae, strong, steps="decoding")
    settings = {**GREEDY, "suppress_tokens": [model.family.image_token_id]}
    cached, again = (steered.generate(**batch, **settings, use_cache=use) for use in (True, False))
    assert torch.allclose(scores(again), scores(cached), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"max_new_tokens": 1}])
def test_a_bare_generation_ends_without_a_warning(
    options: dict[str, Any], model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, strong: dict[int, Any]
) -> None:
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [model.family.image_token_id], **options}
    twice = steer(steer(model, sae, strong), sae, {3: Add(1.0)}, tokens="image")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ends = int(twice.generate(**batch, **settings)[0, batch["input_ids"].shape[1]])
        # The run may also end before the number of tokens asked for.
        twice.generate(**batch, **settings, eos_token_id=ends)
    assert not caught


def test_text_leaves_control_tokens_alone_while_decoding(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, active: list[int], strong: dict[int, Any]
) -> None:
    control = torch.tensor(special_ids(model.tokenizer))
    plain_ids = model.generate(**batch, **GREEDY).sequences[:, batch["input_ids"].shape[1] :]
    steered = steer(model, sae, strong, tokens="text", steps="decoding")
    found = steered.generate(**batch, **GREEDY)
    new = found.sequences[:, batch["input_ids"].shape[1] :]

    def masks(step: int, output: Tensor) -> Tensor | None:
        return None if not step else ~torch.isin(new[:, step - 1 : step], control)

    with torch.no_grad(), hooked(model, sae, active, masks):
        expected = model._module.generate(**batch, **GREEDY)
    assert torch.equal(scores(found), scores(expected))
    assert plain_ids.shape == new.shape


def test_the_original_is_unchanged_and_the_copy_can_be_used_everywhere(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, conversations: Conversations, active: list[int]
) -> None:
    before = (model.answer(conversations, max_new_tokens=4), scores(model.generate(**batch, **GREEDY)))
    steered = steer(model, sae, {active[0]: Set(300.0)})
    answers = steered.answer(conversations, max_new_tokens=4)
    assert answers != before[0]
    assert answers == steered.answer(conversations, max_new_tokens=4)
    # Within one's own trace the steered value is read.
    with torch.no_grad(), steered.trace(**batch):
        inside = steered.hooks[HOOK].save()
    assert torch.equal(inside, read_activations(steered, batch, HOOK)[HOOK])
    # And within one's own generation.
    with steered.generate(**batch, **GREEDY) as tracer:
        result = tracer.result.save()
    assert torch.equal(scores(result), scores(steered.generate(**batch, **GREEDY)))
    # Hooks before the steered one are reached without a complaint that the steered one is not.
    early = read_activations(steered, batch, "hook_embed")["hook_embed"]
    assert torch.equal(early, read_activations(model, batch, "hook_embed")["hook_embed"])
    assert model.answer(conversations, max_new_tokens=4) == before[0]
    assert torch.equal(scores(model.generate(**batch, **GREEDY)), before[1])
    assert not model._module.get_submodule(MODULE)._forward_hooks


def test_rows_of_a_batch_are_steered_as_alone(
    model: VisionLanguageModel, sae: SAE[Any], conversations: Conversations, strong: dict[int, Any]
) -> None:
    # one of them has no picture
    steered = steer(model, sae, strong, tokens="image", if_empty="ignore")
    together = read_activations(steered, model.encode(conversations), HOOK)[HOOK]
    for row, conversation in enumerate(conversations):
        alone = read_activations(steered, model.encode(conversation), HOOK)[HOOK][0]
        assert torch.allclose(together[row, -len(alone) :], alone, atol=1e-4)


def test_a_run_in_which_nothing_is_chosen_says_so(
    model: VisionLanguageModel, sae: SAE[Any], conversations: Conversations, strong: dict[int, Any]
) -> None:
    words = model.encode(conversations[1], add_generation_prompt=True)
    plain = read_activations(model, words, HOOK)[HOOK]

    def nothing(layout: TokenLayout) -> Tensor:
        return torch.zeros_like(layout.is_text)

    # a function may choose generated tokens yet, unless it is asked about the prompt alone
    for tokens, steps in (("image", "all"), (nothing, "prefill"), (nothing, range(1))):
        steered = steer(model, sae, strong, tokens=tokens, steps=steps)
        with pytest.raises(SelectionError, match="selects nothing in these prompts"):
            read_activations(steered, words, HOOK)
        with pytest.raises(SelectionError, match="selects nothing in these prompts"):
            steered.generate(**words, **GREEDY)
        let = steer(model, sae, strong, tokens=tokens, steps=steps, if_empty="ignore")
        assert torch.equal(read_activations(let, words, HOOK)[HOOK], plain)
    assert torch.equal(read_activations(steer(model, sae, strong, tokens=nothing), words, HOOK)[HOOK], plain)
    with pytest.raises(ConfigError, match="if_empty='perhaps'"):
        steer(model, sae, strong, if_empty="perhaps")  # type: ignore[arg-type]


def test_positions_count_from_each_prompts_own_beginning(
    model: VisionLanguageModel, sae: SAE[Any], conversations: Conversations, batch: EncodedBatch
) -> None:
    steered = steer(model, sae, {3: Set(500.0)}, tokens=[2, -1])
    moved = (read_activations(steered, batch, HOOK)[HOOK] != read_activations(model, batch, HOOK)[HOOK]).any(-1)
    for row, attended in enumerate(batch["attention_mask"] != 0):
        places = attended.nonzero()[:, 0]
        assert moved[row].nonzero()[:, 0].tolist() == [int(places[2]), int(places[-1])]


def test_several_invokes_are_steered_each_by_its_own_pictures(
    model: VisionLanguageModel, sae: SAE[Any], conversations: Conversations, strong: dict[int, Any]
) -> None:
    steered = steer(model, sae, strong, tokens="image")
    alone = read_activations(steered, model.encode(conversations[2]), HOOK)[HOOK]
    with torch.no_grad(), steered.trace() as tracer:
        with tracer.invoke(**model.encode(conversations[0])):
            pass
        with tracer.invoke(**model.encode(conversations[2])):
            found = steered.hooks[HOOK].save()
    assert torch.allclose(found[:, -alone.shape[1] :], alone, atol=1e-4)


def test_beams_and_samples_of_a_prompt_are_all_steered(
    model: VisionLanguageModel, sae: SAE[Any], conversations: Conversations, batch: EncodedBatch, active: list[int]
) -> None:
    one = model.encode(conversations[:2])
    steered = steer(model, sae, {active[0]: Set(300.0)}, tokens="image")
    by_mask = steer(model, sae, {active[0]: Set(300.0)}, tokens=one.layout.is_image)
    beams = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    found = steered.generate(**one, **beams)
    assert torch.equal(found, by_mask.generate(**one, **beams))
    assert not torch.equal(found, model.generate(**one, **beams))


@pytest.mark.parametrize(
    "changes", [{}, {5: Add(0.0)}, {5: Scale(1.0), 7: Add(0)}], ids=["none", "add 0", "scale 1 and add 0"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_changing_nothing_changes_no_bit(changes: dict[int, Any], dtype: str, batch: EncodedBatch) -> None:
    module, processor = random_llava_next()
    model = load_model(module, processor=processor, dtype=dtype)
    halved = {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    steered = steer(model, build_sae("jumprelu"), changes, hook_name=HOOK)
    plain, found = model.generate(**halved, **GREEDY), steered.generate(**halved, **GREEDY)
    assert torch.equal(scores(found), scores(plain))


def test_dropping_the_error_leaves_the_reconstruction(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, active: list[int], strong: dict[int, Any]
) -> None:
    mask = batch.layout.is_image
    before = read_activations(model, batch, HOOK)[HOOK]
    z = sae.encode(before[mask])
    plain = read_activations(steer(model, sae, {}, tokens="image", error="drop"), batch, HOOK)[HOOK]
    assert torch.allclose(plain[mask], sae.decode(z), atol=1e-5)
    assert torch.equal(plain[~mask], before[~mask])
    found = read_activations(steer(model, sae, strong, tokens="image", error="drop"), batch, HOOK)[HOOK]
    assert torch.allclose(found[mask], sae.decode(changed(z, active)), atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("topk", {"normalize_activations": "layer_norm"}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("standard", {"normalize_activations": "constant_norm_rescale"}),
        ("gated", {}),
    ],
)
def test_keeping_the_error_moves_by_the_difference_of_reconstructions(
    architecture: str, config: dict[str, Any]
) -> None:
    sae = build_sae(architecture, **config)
    acts = torch.randn(20, 48, generator=torch.Generator().manual_seed(3))
    changes = {4: Set(3.0), 9: Add(1.5), 11: Ablate()}
    plain, moved = steer_tokens(sae, acts, {}, error="drop"), steer_tokens(sae, acts, changes, error="drop")
    assert torch.allclose(steer_tokens(sae, acts, changes), acts + moved - plain, atol=1e-5)


def test_masks_positions_and_functions(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, strong: dict[int, Any]
) -> None:
    before = read_activations(model, batch, HOOK)[HOOK]

    def touched(tokens: Any) -> Tensor:
        after = read_activations(steer(model, sae, strong, tokens=tokens), batch, HOOK)[HOOK]
        return (before != after).any(-1)

    mask = batch.layout.is_image & (batch.layout.tile == 0)
    assert torch.equal(touched(mask), mask)
    assert torch.equal(touched(mask[0]), mask[0].expand(len(mask), -1))
    positions = torch.zeros_like(mask)
    positions[:, [-1, -3]] = True
    assert torch.equal(touched([-1, -3]), positions)
    assert torch.equal(touched(torch.tensor([-1, -3])), positions)
    assert torch.equal(touched(lambda layout: layout.is_image & (layout.tile == 0)), mask)
    seen = []
    touched(lambda layout: (seen.append(layout), layout.is_text)[1])
    assert torch.equal(seen[0].modality, batch.layout.modality)
    assert torch.equal(seen[0].boxes.nan_to_num(-1), batch.layout.boxes.nan_to_num(-1))
    assert seen[0].image_sizes == batch.layout.image_sizes


def test_masks_are_about_the_prompt_alone(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, strong: dict[int, Any]
) -> None:
    everything = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    by_mask = steer(model, sae, strong, tokens=everything).generate(**batch, **GREEDY)
    by_step = steer(model, sae, strong, tokens="all", steps="prefill").generate(**batch, **GREEDY)
    assert torch.equal(by_mask.sequences, by_step.sequences)


def test_right_padding(
    model: VisionLanguageModel, sae: SAE[Any], conversations: Conversations, strong: dict[int, Any]
) -> None:
    batch = model.encode(conversations, padding_side="right")
    before = read_activations(model, batch, HOOK)[HOOK]
    for tokens in ("all", "last"):
        after = read_activations(steer(model, sae, strong, tokens=tokens), batch, HOOK)[HOOK]  # type: ignore[arg-type]
        attended = batch["attention_mask"].bool()
        ends = attended.sum(-1) - 1
        last = torch.zeros_like(attended).index_put((torch.arange(len(ends)), ends), torch.tensor(True))
        assert torch.equal((before != after).any(-1), last if tokens == "last" else attended)
        assert not (batch.layout.modality[(before != after).any(-1)] == Modality.PADDING).any()


def test_steering_can_be_steered_again(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, active: list[int]
) -> None:
    once = steer(model, sae, {active[0]: Add(2.0)})
    twice = steer(once, sae, {active[0]: Add(2.0)})
    both = steer(model, sae, {active[0]: Add(4.0)})
    found = read_activations(twice, batch, HOOK)[HOOK]
    assert torch.allclose(found, read_activations(both, batch, HOOK)[HOOK], atol=1e-5)
    earlier = steer(once, sae, {active[0]: Add(2.0)}, hook_name="blocks.0.hook_resid_pre")
    assert not torch.equal(read_activations(earlier, batch, HOOK)[HOOK], read_activations(once, batch, HOOK)[HOOK])


def test_attention_heads(model: VisionLanguageModel, batch: EncodedBatch) -> None:
    name = "blocks.1.attn.hook_z"
    heads = build_sae(reshape_activations="hook_z", metadata={"hook_name": name})
    before = read_activations(model, batch, name)[name]
    after = read_activations(steer(model, heads, {3: Add(2.0)}, tokens="last"), batch, name)[name]
    assert after.shape == before.shape
    expected = before[:, -1].flatten(1) + 2.0 * heads.W_dec[3]
    assert torch.allclose(after[:, -1].flatten(1), expected, atol=1e-5)


def test_hooks_of_the_vision_tower(
    model: VisionLanguageModel, batch: EncodedBatch, conversations: Conversations
) -> None:
    name = "vision.blocks.0.hook_resid_post"
    vision = build_sae(d_in=32)
    before = read_activations(model, batch, [name, HOOK])
    steered = steer(model, vision, {3: Add(50.0)}, hook_name=name)
    after = read_activations(steered, batch, [name, HOOK])
    assert torch.allclose(after[name], before[name] + 50.0 * vision.W_dec[3], atol=1e-4)
    text_alone = batch["input_ids"].ne(model.family.image_token_id).all(-1)
    assert torch.equal(after[HOOK][text_alone], before[HOOK][text_alone])
    plain = model.generate(**batch, **GREEDY)
    assert not torch.equal(scores(steered.generate(**batch, **GREEDY)), scores(plain))
    text = conversations[1]
    assert steered.answer(text, max_new_tokens=3) == model.answer(text, max_new_tokens=3)
    for choice in ({"tokens": "image"}, {"steps": "decoding"}, {"tokens": [0]}):
        with pytest.raises(SelectionError, match="sees pictures, not tokens"):
            steer(model, vision, {3: Add(1.0)}, hook_name=name, **choice)  # type: ignore[arg-type]


def test_gradients_pass_through(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> None:
    steered = steer(model, sae, {3: Add(1.0)})
    with steered.trace(**batch):
        early = steered.hooks["hook_embed"]
        early.requires_grad_(True)
        with steered.output.logits.sum().backward():
            gradient = early.grad.save()
    assert gradient.abs().sum() > 0


def test_a_scan_is_let_through(model: VisionLanguageModel, sae: SAE[Any]) -> None:
    steered = steer(model, sae, {3: Set(1.0)}, tokens="text")
    text = model.encode([{"role": "user", "content": "a red circle"}])
    shapes: list[tuple[int, ...]] = []
    with steered.scan(**text):
        shapes.append(tuple(steered.hooks[HOOK].shape))
    assert shapes == [(*text["input_ids"].shape, 48)]


def test_an_error_while_running_leaves_nothing_behind(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch, conversations: Conversations
) -> None:
    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model._module.modules())

    before, hooks_before = scores(model.generate(**batch, **GREEDY)), hooks()
    wrong = torch.ones(2, 5, dtype=torch.bool)
    for tokens, message in (
        (wrong, r"\(2, 5\) for a forward pass of 3 rows"),
        ([9999], "position 9999; the prompt in row 0 has"),
    ):
        broken = steer(model, sae, {3: Set(500.0)}, tokens=tokens)
        for run in (lambda m: m.generate(**batch, **GREEDY), lambda m: read_activations(m, batch, HOOK)):
            with pytest.raises(SelectionError, match=message):
                run(broken)
        with pytest.raises(SelectionError, match=message), broken.trace(**batch):
            broken.output.logits.save()

    def fail(layout: object) -> Tensor:
        raise ZeroDivisionError("in the caller's function")

    with pytest.raises(ZeroDivisionError, match="caller's"):
        steer(model, sae, {3: Set(500.0)}, tokens=fail).answer(conversations)
    with pytest.raises(SelectionError, match="mask of int"):
        steer(model, sae, {3: Set(5.0)}, tokens=lambda layout: 3).answer(conversations)  # type: ignore[arg-type,return-value]
    assert torch.equal(scores(model.generate(**batch, **GREEDY)), before)
    assert hooks() == hooks_before


def test_inputs_that_do_not_tell_where_the_pictures_are(
    model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch
) -> None:
    steered = steer(model, sae, {3: Set(5.0)}, tokens="image")
    # a copy: of the batch's own ids it is known which pictures they are about
    ids = {"input_ids": batch["input_ids"].clone(), "attention_mask": batch["attention_mask"]}
    with pytest.raises(SelectionError, match="given no picture sizes"):
        read_activations(steered, ids, HOOK)
    embedded = {"inputs_embeds": torch.randn(1, 4, 48)}
    with pytest.raises(SelectionError, match="embeddings instead of token ids"):
        read_activations(steered, embedded, HOOK)
    every = steer(model, sae, {3: Set(5.0)})
    assert not torch.equal(read_activations(every, embedded, HOOK)[HOOK], read_activations(model, embedded, HOOK)[HOOK])


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({96: Set(1.0)}, {}, FeatureError, "feature 96; expected an integer from 0 to 95"),
        ({-1: Set(1.0)}, {}, FeatureError, "feature -1"),
        ({3: Set(float("nan"))}, {}, ConfigError, "nan.*finite"),
        ({3: 8.0}, {}, ConfigError, "expected Set"),
        ({3: Set(1.0)}, {"error": "forget"}, ConfigError, "'keep' or 'drop'"),
        ({3: Set(1.0)}, {"tokens": "pictures"}, SelectionError, "expected one of all, image, text, last"),
        ({3: Set(1.0)}, {"steps": "later"}, SelectionError, "expected one of all, prefill, decoding"),
        ({3: Set(1.0)}, {"tokens": []}, SelectionError, "select nothing"),
        ({3: Set(1.0)}, {"tokens": torch.zeros(2, 3, dtype=torch.bool)}, SelectionError, "select nothing"),
        ({3: Set(1.0)}, {"tokens": torch.rand(3)}, SelectionError, "mask of bool, or positions"),
        ({3: Set(1.0)}, {"tokens": torch.ones(1, 1, 1, dtype=torch.bool)}, SelectionError, r"expected \[batch, seq\]"),
        ({3: Set(1.0)}, {"tokens": 3.5}, SelectionError, "mask of bool, or positions"),
        ({3: Set(1.0)}, {"tokens": object()}, SelectionError, "type object"),
        ({3: Set(1.0)}, {"tokens": "image", "steps": "decoding"}, SelectionError, "never"),
        ({3: Set(1.0)}, {"tokens": [1], "steps": "decoding"}, SelectionError, "about the prompt"),
        ({3: Set(1.0)}, {"hook_name": "blocks.77.hook_resid_post"}, UnknownHookError, "blocks.77"),
        ({3: Set(1.0)}, {"hook_name": "vision.blocks.0.hook_resid_post"}, SAEMismatchError, "d_in=48.*width 32"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    changes: dict[int, Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    model: VisionLanguageModel,
    sae: SAE[Any],
) -> None:
    with pytest.raises(error, match=message):
        steer(model, sae, changes, **options)
