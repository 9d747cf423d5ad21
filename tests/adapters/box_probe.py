"""Finding out by plain PyTorch hooks which tokens see which pixels: nothing here uses an adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

CHUNK = 32
GREY, WHITE = 90, 255


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass
    """The first block of the language model was reached."""


def features_for(module: Any, inputs: Any) -> Tensor:
    """What the language model's first block gets: [batch, seq, d], pictures put in place."""
    got: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        got.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise _Reached

    handle = module.get_decoder().layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), contextlib.suppress(_Reached):
            module(**inputs)
    finally:
        handle.remove()
    return got[0]


@contextlib.contextmanager
def nothing_mixes(module: Any) -> Iterator[None]:
    """Silence attention in every block outside of the language model, so that a patch sees nothing but itself."""
    decoder = {id(part) for part in module.get_decoder().modules()}

    def silence(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handles = [
        part.register_forward_hook(silence)
        for path, part in module.named_modules()
        if id(part) not in decoder
        and "Attention" in type(part).__name__
        and any(step.isdigit() for step in path.split("."))
    ]
    assert handles, "no attention was found"
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seen_by_tokens(
    module: Any, encode: Callable[[Sequence[Image.Image]], Any], width: int, height: int, axis: int
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Tell for every line of pixels which positions it reaches: [width or height, seq].

    Args:
        module: the model.
        encode: makes model inputs of a batch of pictures, one prompt each.
        width: of the picture.
        height: of the picture.
        axis: 0 for columns of pixels, 1 for rows.
    """
    plain = np.full((height, width, 3), GREY, dtype=np.uint8)
    reached = []
    length = (width, height)[axis]
    with nothing_mixes(module):
        for start in range(0, length, CHUNK):
            pictures = [Image.fromarray(plain)]
            for line in range(start, min(start + CHUNK, length)):
                changed = plain.copy()
                changed[(slice(None), line) if axis == 0 else line] = WHITE
                pictures.append(Image.fromarray(changed))
            features = features_for(module, encode(pictures))
            difference = (features[1:] - features[:1]).abs().amax(-1)
            # the same sum in another place of the batch may round differently
            reached.append((difference > 1e-4 * features.abs().amax()).numpy())
    return np.concatenate(reached)
