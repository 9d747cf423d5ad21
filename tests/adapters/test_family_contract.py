"""What every registered family must do, checked on a tiny random model against plain PyTorch and transformers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sae_lens_multimodal.adapters.hook_points import HookPoint
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.types import Modality
from tests.adapters.adapter_samples import mixed_prompts, picture, prompt

TOLERANCE = 5e-5


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """Nothing here needs them."""
    with torch.no_grad():
        yield


def logits_of(model: VisionLanguageModel, batch: Any) -> Tensor:
    with model.trace(**batch):
        logits: Tensor = model.output.logits.save()
    return logits


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value


@contextlib.contextmanager
def recorded(module: nn.Module, point: HookPoint, into: dict[str, Tensor]) -> Iterator[None]:
    """A plain PyTorch hook for a hook point."""

    def keep(value: Tensor) -> None:
        into[point.name] = value if point.heads is None else value.unflatten(-1, (point.heads, -1))

    target = module.get_submodule(point.module_path)
    if point.side == "input":
        handle = target.register_forward_pre_hook(
            lambda _, args, kwargs: keep(first_input(args, kwargs)), with_kwargs=True
        )
    else:
        handle = target.register_forward_hook(
            lambda _, args, output: keep(output if point.element is None else output[point.element])
        )
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def doubled(module: nn.Module, point: HookPoint) -> Iterator[None]:
    """A plain PyTorch hook that doubles the value."""

    def change_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (args[0] * 2, *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: kwargs[name] * 2}

    def change_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if point.element is None:
            return output * 2
        return tuple(value * 2 if index == point.element else value for index, value in enumerate(output))

    target = module.get_submodule(point.module_path)
    if point.side == "input":
        handle = target.register_forward_pre_hook(change_input, with_kwargs=True)
    else:
        # before the hooks through which transformers collects hidden states
        handle = target.register_forward_hook(change_output, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def test_every_module_exists_and_names_are_unique(random_model: VisionLanguageModel) -> None:
    points = random_model.hooks.points()
    assert len({point.name for point in points}) == len(points)
    assert [point.order for point in points] == list(range(len(points)))
    paths = {path for path, _ in random_model._module.named_modules()}
    assert {point.module_path for point in points} <= paths
    assert set(random_model.family.media_modules) <= paths
    assert {random_model.family.final_norm, random_model.family.unembedding} <= paths


def test_the_hooks_that_everyone_relies_on(random_model: VisionLanguageModel) -> None:
    names = set(random_model.hooks.names())
    for index in range(random_model.n_layers):
        mid = () if random_model.family.parallel_blocks else ("resid_mid",)
        for hook in ("resid_pre", *mid, "resid_post", "attn_out", "mlp_out"):
            name = f"blocks.{index}.hook_{hook}"
            assert name in names
            point = random_model.hooks.resolve(name)
            assert (point.layer, point.tower, point.d) == (index, "language", random_model.d_model)
    assert {"hook_embed", "projector.hook_out", "vision.blocks.0.hook_resid_post", "ln_final.hook_out"} <= names
    assert random_model.hooks.resolve("vision.blocks.0.hook_resid_post").tower == "vision"
    assert random_model.hooks.resolve("projector.hook_out").tower == "projector"


def test_values_are_those_of_plain_hooks_bit_for_bit(random_model: VisionLanguageModel, plain_module: Any) -> None:
    batch = random_model.encode(mixed_prompts())
    points = [point for point in random_model.hooks.points() if point.operation is None]
    expected: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for point in points:
            stack.enter_context(recorded(plain_module, point, expected))
        output = plain_module(**batch)
    got: dict[str, Tensor] = {}
    with random_model.trace(**batch):
        # all of them in one trace, in the order in which they are listed, the inner operations too
        for name in random_model.hooks.names():
            got[name] = random_model.hooks[name].save()
        logits = random_model.output.logits.save()
    assert torch.equal(logits, output.logits)
    for point in points:
        assert torch.equal(got[point.name], expected[point.name]), point.name
    for point in random_model.hooks.points():
        value = got[point.name]
        assert value.isfinite().all() or "scores" in point.name, point.name
        if point.d is not None:
            width = value.shape[-1] * (point.heads or 1)
            assert width == point.d, point.name
    for block in sorted({name[: name.index("hook_resid_pre")] for name in got if name.endswith("hook_resid_pre")}):
        check_block(got, block, parallel=random_model.family.parallel_blocks and not block.startswith("vision"))


def check_block(got: dict[str, Tensor], block: str, *, parallel: bool) -> None:
    """What lies inside of a module's forward, where no plain hook reaches, by what it must be."""
    attended = got[f"{block}hook_resid_pre"] + got[f"{block}hook_attn_out"]
    assert (f"{block}hook_resid_mid" not in got) == parallel, block
    if not parallel:
        assert torch.equal(got[f"{block}hook_resid_mid"], attended), block
        assert torch.equal(got[f"{block}ln2.hook_in"], attended), block
    assert torch.equal(got[f"{block}hook_resid_post"], attended + got[f"{block}hook_mlp_out"]), block
    if f"{block}attn.hook_pattern" in got:
        pattern, scores = got[f"{block}attn.hook_pattern"], got[f"{block}attn.hook_attn_scores"]
        torch.testing.assert_close(pattern, scores.float().softmax(-1), atol=1e-5, rtol=1e-5)
    for norm in ("ln1", "ln2"):
        if f"{block}{norm}.hook_normalized" in got:
            before, normalized = got[f"{block}{norm}.hook_in"], got[f"{block}{norm}.hook_normalized"]
            if normalized.mean(-1).abs().max() < 1e-4:
                # not all of them leave the mean as it is
                before = before - before.mean(-1, keepdim=True)
            expected = before / before.square().mean(-1, keepdim=True).sqrt()
            torch.testing.assert_close(normalized, expected, atol=1e-3, rtol=1e-2)


def one_of_each_kind(points: Sequence[HookPoint]) -> list[HookPoint]:
    """The first of the hooks that differ only in the number of their block."""
    kinds: dict[str, HookPoint] = {}
    for point in points:
        kinds.setdefault(re.sub(r"\.\d+\.", ".N.", point.name), point)
    return list(kinds.values())


def test_writing_is_what_a_plain_hook_would_change(random_model: VisionLanguageModel, plain_module: Any) -> None:
    batch = random_model.encode(prompt(picture(40, 40), "what is this ?"))
    for point in one_of_each_kind([point for point in random_model.hooks.points() if point.operation is None]):
        with doubled(plain_module, point):
            expected = plain_module(**batch).logits
        with random_model.trace(**batch):
            random_model.hooks[point.name] = random_model.hooks[point.name] * 2
            logits = random_model.output.logits.save()
        assert torch.equal(logits, expected), point.name


def test_an_identity_edit_changes_nothing(random_model: VisionLanguageModel) -> None:
    batch = random_model.encode(mixed_prompts())
    before = logits_of(random_model, batch)
    with random_model.edit() as (_tracer, edited):
        for name in edited.hooks.names():
            edited.hooks[name] = edited.hooks[name]
    assert torch.equal(logits_of(edited, batch), before)
    assert torch.equal(logits_of(random_model, batch), before)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_what_each_prompt_gives_alone(random_model: VisionLanguageModel, side: Any) -> None:
    prompts = mixed_prompts()
    batch = random_model.encode(prompts, padding_side=side)
    hook = f"blocks.{random_model.n_layers - 1}.hook_resid_post"
    with random_model.trace(**batch):
        together = random_model.hooks[hook].save()
    for row, one in enumerate(prompts):
        alone = random_model.encode(one)
        with random_model.trace(**alone):
            expected = random_model.hooks[hook].save()
        kept = batch.layout.modality[row] != Modality.PADDING
        torch.testing.assert_close(together[row][kept], expected[0], atol=TOLERANCE, rtol=TOLERANCE)
        for name in ("modality", "boxes", "image_index", "tile"):
            own, other = getattr(batch.layout, name)[row][kept], getattr(alone.layout, name)[0]
            torch.testing.assert_close(own, other, equal_nan=True, rtol=0, atol=0)


def test_each_invoke_sees_its_own_rows(random_model: VisionLanguageModel) -> None:
    prompts = mixed_prompts()
    hooks = ("vision.blocks.0.hook_resid_post", "projector.hook_out", "blocks.1.hook_resid_post")
    got: list[list[Tensor]] = [[] for _ in prompts]
    with random_model.trace() as tracer:
        for row, one in enumerate(prompts):
            # chat messages and encoded batches alike
            arguments: Any = ((), dict(random_model.encode(one))) if row % 2 else ((one,), {})
            with tracer.invoke(*arguments[0], **arguments[1]):
                for hook in hooks:
                    got[row].append(random_model.hooks[hook].save())
    for row, one in enumerate(prompts):
        alone = random_model.encode(one)
        has_pictures = bool(alone.layout.is_image.any())
        expected = []
        with random_model.trace(**alone):
            for hook in hooks if has_pictures else hooks[-1:]:
                expected.append(random_model.hooks[hook].save())
        assert has_pictures or [value.numel() for value in got[row][:-1]] == [0, 0]
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(got[row][-1][:, -length:], expected[-1], atol=TOLERANCE, rtol=TOLERANCE)
        for own, other in zip(got[row], expected[:-1], strict=False):
            torch.testing.assert_close(own, other, atol=TOLERANCE, rtol=TOLERANCE)


def test_an_edit_in_one_invoke_leaves_the_others(random_model: VisionLanguageModel) -> None:
    first, second = prompt(picture(60, 90), "what is this ?"), prompt(picture(50, 20), "is there a circle ?")
    plain = [logits_of(random_model, random_model.encode(one)) for one in (first, second)]
    points = one_of_each_kind(random_model.hooks.points())
    for tower in ("vision", "projector", "language"):
        # a tower's hooks all at once: one that reaches the other invoke is enough
        hooks = [point.name for point in points if point.tower == tower]
        with random_model.trace() as tracer:
            with tracer.invoke(first):
                for hook in hooks:
                    # not a mere multiple: where a norm follows, it would take that back
                    random_model.hooks[hook] = random_model.hooks[hook] * 0.5 + 0.1
                changed = random_model.output.logits.save()
            with tracer.invoke(second):
                untouched = random_model.output.logits.save()
        length = plain[1].shape[1]
        torch.testing.assert_close(untouched[:, -length:], plain[1], atol=TOLERANCE, rtol=TOLERANCE)
        assert (changed[:, -plain[0].shape[1] :] - plain[0]).abs().max() > 1e-3, tower


def test_nothing_stays_behind_after_an_exception(random_model: VisionLanguageModel) -> None:
    batch = random_model.encode(mixed_prompts())
    before = logits_of(random_model, batch)
    hooks_before = {path: len(module._forward_hooks) for path, module in random_model._module.named_modules()}
    with pytest.raises(ZeroDivisionError), random_model.trace(**batch):
        random_model.hooks["blocks.0.hook_resid_post"] = random_model.hooks["blocks.0.hook_resid_post"] * 0
        raise ZeroDivisionError
    assert torch.equal(logits_of(random_model, batch), before)
    with pytest.raises(KeyError), random_model.trace(**batch):
        random_model.hooks["blocks.1.attn.hook_pattern"] = random_model.hooks["blocks.1.attn.hook_pattern"] * 0
        random_model.hooks["blocks.7000.hook_resid_post"].save()
    assert torch.equal(logits_of(random_model, batch), before)
    assert torch.equal(random_model._module(**batch).logits, before)
    assert hooks_before == {path: len(module._forward_hooks) for path, module in random_model._module.named_modules()}
    assert random_model._edits == []


def test_generation_is_that_of_transformers(random_model: VisionLanguageModel, plain_module: Any) -> None:
    prompts = mixed_prompts()
    batch = random_model.encode(prompts, add_generation_prompt=True)
    without_positions = {name: value for name, value in batch.items() if name != "position_ids"}
    expected = plain_module.generate(**without_positions, max_new_tokens=6, do_sample=False)
    assert torch.equal(random_model.generate(**batch, max_new_tokens=6, do_sample=False), expected)
    new = expected[:, batch["input_ids"].shape[1] :]
    texts = [text.strip() for text in random_model.tokenizer.batch_decode(new, skip_special_tokens=True)]
    assert random_model.answer(prompts, max_new_tokens=6) == texts
    assert random_model.answer(prompts, max_new_tokens=6, batch_size=1) == texts
    assert random_model.answer(prompts[1], max_new_tokens=6) == texts[1:2]


def test_generation_in_several_invokes(random_model: VisionLanguageModel) -> None:
    prompts = mixed_prompts()[:3]
    alone = [random_model.answer(one, max_new_tokens=4)[0] for one in prompts]
    with random_model.generate(max_new_tokens=4, do_sample=False) as tracer:
        for one in prompts:
            with tracer.invoke(one):
                random_model.hooks["blocks.0.hook_resid_post"].save()
        with tracer.invoke():
            tokens = tracer.result.save()
    texts = random_model.tokenizer.batch_decode(tokens[:, -4:], skip_special_tokens=True)
    assert [text.strip() for text in texts] == alone


def test_an_edited_model_answers_as_edited(random_model: VisionLanguageModel) -> None:
    one = prompt(picture(60, 90), "what is this ?")
    before = random_model.answer(one, max_new_tokens=4)
    with random_model.edit() as (tracer, edited):
        for _ in tracer.all():
            edited.hooks["unembed.hook_out"] = edited.hooks["unembed.hook_out"] * -1
    assert edited.answer(one, max_new_tokens=4) != before
    assert edited.hooks.names() == random_model.hooks.names()
    assert random_model.answer(one, max_new_tokens=4) == before


def test_shapes_without_a_forward_pass(random_model: VisionLanguageModel) -> None:
    batch = random_model.encode(mixed_prompts())
    shapes: list[tuple[int, ...]] = []
    with random_model.scan(**batch):
        shapes.append(tuple(random_model.hooks["blocks.0.hook_resid_post"].shape))
    assert shapes == [(*batch["input_ids"].shape, random_model.d_model)]


def test_prompts_are_those_of_transformers(random_model: VisionLanguageModel) -> None:
    processor = random_model.processor
    if processor.chat_template is None:
        pytest.skip("its processor writes no conversations")
    for one in mixed_prompts():
        messages = [
            {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}
            for message in one
            for content in (message["content"],)
        ]
        ends = one[-1]["role"] == "user"
        expected = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=ends, return_dict=True)
        assert random_model.encode(one)["input_ids"].tolist() == np.asarray(expected["input_ids"]).tolist()


def test_layouts_of_many_prompts(random_model: VisionLanguageModel) -> None:
    batch = random_model.encode(mixed_prompts())
    layout, ids = batch.layout, batch["input_ids"]
    assert layout.modality.shape == ids.shape
    assert torch.equal(layout.modality == Modality.PADDING, batch["attention_mask"] == 0)
    family = random_model.family
    marked = np.isin(ids.numpy(), [*family.markers()])
    of_pictures = torch.from_numpy(family.is_placeholder(ids.numpy()) | marked)
    # line breaks that a processor writes between tiles are ordinary tokens elsewhere
    of_pictures |= layout.modality == Modality.NEWLINE
    # a text without pictures has no markers either
    assert torch.equal(of_pictures, layout.image_index >= 0)
    assert torch.equal(layout.is_image, ~layout.boxes.isnan().any(-1))
    assert torch.equal(layout.is_image, layout.tile >= 0)
    assert not (layout.is_text & torch.isin(ids, torch.tensor(random_model.tokenizer.all_special_ids))).any()
    assert [len(row) for row in batch.images] == [1, 2, 0, 1]
    assert layout.image_sizes == (((100, 60),), ((30, 90), (7, 3)), (), ((64, 64),))
    assert layout.image_index[1].max() == 1
    for row, sizes in enumerate(layout.image_sizes):
        for image, (width, height) in enumerate(sizes):
            whole = layout.tokens_in((0, 0, width, height), row=row, image=image)
            if layout.inexact[row][image]:
                continue
            assert layout.union_box(whole, row=row) == pytest.approx((0, 0, width, height), abs=1.0)
            heat = layout.heatmap(torch.ones(layout.n_tokens), row=row, image=image)
            assert heat.shape == (height, width)
            assert (heat > 0).all()
    # every text token is the same text whatever its row was filled up with
    words = random_model.token_strings(ids[2][layout.kept[2]])
    assert " ".join(word.strip() for word in words) == "yes and no"
