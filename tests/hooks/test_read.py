"""Reading gives what plain PyTorch sees, and runs no more of the model than it must."""

from __future__ import annotations

import pytest
import torch

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import SelectionError, UnknownHookError
from sae_lens_multimodal.hooks.read import read_activations
from tests.hooks.hook_samples import HOOK


def test_values_are_those_of_plain_hooks_in_any_order(model: VisionLanguageModel, batch: EncodedBatch) -> None:
    names = [
        HOOK,
        "blocks.0.hook_resid_pre",
        "vision.blocks.0.hook_resid_post",
        "blocks.1.attn.hook_z",
        "projector.hook_out",
        "blocks.0.mlp.hook_post",
    ]
    expected: dict[str, torch.Tensor] = {}
    handles = []
    for name in names:
        point = model.hooks.resolve(name)
        module = model._module.get_submodule(point.module_path)

        def before(_: object, args: tuple, kwargs: dict, name: str = name) -> None:  # type: ignore[type-arg]
            expected[name] = args[0] if args else kwargs["hidden_states"]

        def after(_: object, args: tuple, output: torch.Tensor, name: str = name) -> None:  # type: ignore[type-arg]
            expected[name] = output

        handles.append(
            module.register_forward_pre_hook(before, with_kwargs=True)
            if point.side == "input"
            else module.register_forward_hook(after)
        )
    with torch.no_grad():
        model._module(**batch)
    for handle in handles:
        handle.remove()
    for stop in (True, False):
        found = read_activations(model, batch, names, stop=stop)
        assert list(found) == names
        for name in names:
            assert torch.equal(found[name].flatten(), expected[name].flatten()), name
            assert not found[name].requires_grad


@pytest.mark.parametrize(("stop", "expected"), [(True, []), (False, ["layers.1", "lm_head"])])
def test_nothing_deeper_is_computed(
    stop: bool, expected: list[str], model: VisionLanguageModel, batch: EncodedBatch
) -> None:
    ran: list[str] = []
    handles = [
        model._module.get_submodule(path).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, path in (("layers.1", "model.language_model.layers.1"), ("lm_head", "lm_head"))
    ]
    read_activations(model, batch, [HOOK, "blocks.0.hook_resid_pre"], stop=stop)
    for handle in handles:
        handle.remove()
    assert ran == expected


def test_names_are_kept_as_given_and_once(model: VisionLanguageModel, batch: EncodedBatch) -> None:
    found = read_activations(model, batch, ["blocks.0.hook_out", HOOK, HOOK])
    assert list(found) == ["blocks.0.hook_out", HOOK]
    assert torch.equal(found["blocks.0.hook_out"], found[HOOK])


def test_the_model_can_be_read_again_after_errors(model: VisionLanguageModel, batch: EncodedBatch) -> None:
    text = model.encode([{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}])
    with pytest.raises(SelectionError, match=r"did not reach vision.blocks.0.hook_resid_post"):
        read_activations(model, text, [HOOK, "vision.blocks.0.hook_resid_post"])
    with pytest.raises(UnknownHookError):
        read_activations(model, text, "blocks.9.hook_resid_post")
    with pytest.raises(SelectionError, match="no hook names"):
        read_activations(model, text, [])
    assert read_activations(model, text, HOOK)[HOOK].shape == (1, batch_length(text), 48)


def batch_length(batch: EncodedBatch) -> int:
    return batch["input_ids"].shape[1]
