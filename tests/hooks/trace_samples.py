"""Restoring with plain PyTorch hooks, one cell at a time: what the tests hold causal tracing against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel


def ask(colour: tuple[int, int, int], words: str = "what is this ?", size: tuple[int, int] = (60, 40)) -> list[Any]:
    """A question about a picture of one colour and one corner of another."""
    picture = Image.new("RGB", size, colour)
    picture.paste((5, 5, 250), (0, 0, 20, 20))
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": words}]}]


def plain_logits(model: VisionLanguageModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of the transformers model itself."""
    with torch.no_grad():
        logits: Tensor = model._module(**inputs).logits
    return logits[0]


def plain_restore(
    model: VisionLanguageModel,
    clean: Mapping[str, Tensor],
    corrupted: Mapping[str, Tensor],
    hooks: Sequence[str],
    positions: Sequence[int],
    columns: slice = slice(None),
) -> Tensor:
    """Logits of the corrupted run with hooks' clean values at some positions, by PyTorch's hooks alone."""
    kept: dict[str, Tensor] = {}

    def run(inputs: Mapping[str, Tensor], restore: bool) -> Tensor:
        with ExitStack() as stack:
            for name in hooks:
                point = model.hooks.resolve(name)
                module = model._module.get_submodule(point.module_path)

                def change(value: Tensor, name: str = name) -> Tensor:
                    if not restore:
                        kept[name] = value.clone()
                        return value
                    value = value.clone()
                    value[0, list(positions), columns] = kept[name][0, list(positions), columns]
                    return value

                if point.side == "input":
                    handle = module.register_forward_pre_hook(
                        lambda _, args, change=change: (change(args[0]), *args[1:])
                    )
                else:

                    def after(_: Any, __: Any, output: Any, change: Any = change, element: Any = point.element) -> Any:
                        if element is None:
                            return change(output)
                        return (*output[:element], change(output[element]), *output[element + 1 :])

                    handle = module.register_forward_hook(after)
                stack.callback(handle.remove)
            return plain_logits(model, inputs)

    run(clean, restore=False)
    return run(corrupted, restore=True)
