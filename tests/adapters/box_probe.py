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
Encoder = Callable[[Sequence[Image.Image]], Any]
"""Makes model inputs of several pictures, one prompt each."""


class _Reached(Exception):
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


def differing(features: Tensor, reference: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which positions differ: the same sum in another place of a batch may round differently."""
    distance = (features - reference).abs().amax(-1)
    return np.asarray((distance > 1e-4 * reference.abs().amax()).numpy())


_returned: dict[type[nn.Module], int] = {}
"""How many values the attention of a class returns; 0 for a bare tensor. Kept, so that it is run but once."""


def silent(attention: nn.Module) -> Callable[..., Any]:
    """A forward that gives zeros in the form in which the attention's own gives its output."""
    own, kind = attention.forward, type(attention)

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if kind not in _returned:
            output = own(*args, **kwargs)
            first = output[0] if isinstance(output, tuple) else output
            assert first.shape == hidden.shape, f"{kind.__name__} returns another shape than it gets"
            _returned[kind] = len(output) if isinstance(output, tuple) else 0
        zeros = torch.zeros_like(hidden)
        return (zeros, *[None] * (_returned[kind] - 1)) if _returned[kind] else zeros

    return forward


@contextlib.contextmanager
def nothing_mixes(module: Any) -> Iterator[None]:
    """Silence attention in every block outside of the language model, so that a patch sees nothing but itself."""
    decoder = {id(part) for part in module.get_decoder().modules()}
    silenced = [
        part
        for path, part in module.named_modules()
        if id(part) not in decoder
        and "Attention" in type(part).__name__
        # a whole block, in Pixtral
        and not type(part).__name__.endswith("Layer")
        and any(step.isdigit() for step in path.split("."))
    ]
    assert silenced, "no attention was found outside of the language model"
    # an instance may have a forward of its own already
    before = [(part, part.__dict__.get("forward")) for part in silenced]
    for part in silenced:
        part.forward = silent(part)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part, own in before:
            if own is None:
                del part.__dict__["forward"]
            else:
                part.forward = own  # type: ignore[method-assign]


def tokens_that_see(
    module: Any, encode: Encoder, size: tuple[int, int], axis: int, lines: Sequence[int]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Change one line of pixels at a time, and tell which positions it reaches: [lines, seq].

    Args:
        module: the model.
        encode: makes model inputs of pictures.
        size: width and height of the picture.
        axis: 0 for columns of pixels, 1 for rows.
        lines: which columns or rows.
    """
    plain = np.full((size[1], size[0], 3), GREY, dtype=np.uint8)
    reached = []
    with nothing_mixes(module):
        for start in range(0, len(lines), CHUNK):
            pictures = [Image.fromarray(plain)]
            for line in lines[start : start + CHUNK]:
                changed = plain.copy()
                changed[(slice(None), line) if axis == 0 else line] = WHITE
                pictures.append(Image.fromarray(changed))
            features = features_for(module, encode(pictures))
            reached.append(differing(features[1:], features[:1]))
    return np.concatenate(reached)


def token_side(config: Any) -> float:
    """Side of what a token stands for, in pixels of the resized picture, where the configuration says what is merged.

    Where it says so in another way, this is the side of a patch, and the probe allows for more than filters reach.
    """
    vision = config.vision_config
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    if hasattr(config, "mm_tokens_per_image"):
        return float(vision.image_size / config.mm_tokens_per_image**0.5)
    merged = getattr(vision, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None)
    return float(patch * (merged or getattr(config, "scale_factor", None) or 1))


def scales(boxes: np.ndarray[Any, Any], whole: np.ndarray[Any, Any], axis: int, side: float) -> np.ndarray[Any, Any]:
    """How many pixels of the original make one of the resized picture along an axis, for each box; at least 1.

    Boxes are cut off at the picture's edges, so a view's largest box tells. Where they differ along the axis, the view
    was padded, and all of its boxes may have been cut off: it has kept its proportions, and the other axis tells too.
    """
    extents, found = boxes[:, 2:] - boxes[:, :2], np.ones(len(boxes))
    for view in (whole, ~whole):
        own = extents[view]
        if len(own):
            padded = own[:, axis].min() < 0.99 * own[:, axis].max()
            found[view] = (own if padded else own[:, axis]).max() / side
    return np.maximum(found, 1)


def lines_at_edges(boxes: np.ndarray[Any, Any], axis: int, length: int, count: int) -> list[int]:
    """The lines just within the edges of some boxes along an axis, which tell more about them than others."""
    large = ((boxes[:, 2:] - boxes[:, :2]) >= 3).all(-1)
    edges = np.unique(boxes[large][:, [axis, axis + 2]].round(1), axis=0)
    if not len(edges):
        return [length // 2]
    low, high = edges[np.linspace(0, len(edges) - 1, count + 2).round().astype(int)[1:-1]].T
    lines = np.concatenate([np.ceil(low + 0.5), np.floor(high - 0.5) - 1])
    return sorted({int(line) for line in lines.clip(0, length - 1)})


def check_edges(
    seen: np.ndarray[Any, Any],
    lines: Sequence[int],
    boxes: np.ndarray[Any, Any],
    axis: int,
    scale: np.ndarray[Any, Any],
    length: int,
    *,
    exact: bool = True,
) -> None:
    """Hold boxes against what was seen, along one axis.

    A line of pixels that lies within a box, half a pixel from its edges, must reach the token; one that is further
    from it than the resize filters reach must not. With every line at hand, the middle of what a token sees must be the
    middle of its box, for the filters reach as far on either side.

    Args:
        seen: [lines, n] of `tokens_that_see`, for image tokens.
        lines: the lines.
        boxes: [n, 4] of the same tokens.
        axis: 0 where the lines are columns, 1 where they are rows.
        scale: [n] of `scales`, from which follows how far filters reach.
        length: of the picture along the axis.
        exact: whether the boxes claim to be; if not, a token still sees nothing far beyond its box, if it has one.
    """
    low, high = boxes[:, axis], boxes[:, axis + 2]
    # those of mere padding lie nowhere
    solid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(-1)
    reach = 3 * scale + 1
    place = np.asarray(lines)[:, None]
    within = (place >= low + 0.5) & (place + 1 <= high - 0.5)
    away = (place + 1 < low - reach) | (place > high + reach)
    assert not seen[away].any(), "a token sees what lies far from its box"
    assert not exact or seen[within & solid].all(), "a token does not see what lies in its box"
    if len(lines) < length or not exact:
        return
    first, last = seen.argmax(0), length - seen[::-1].argmax(0)
    inner = solid & seen.any(0) & (first > 0) & (last < length)
    distance = np.abs((first + last) / 2 - (low + high) / 2)
    assert (distance[inner] <= 1 + 0.5 * scale[inner]).all(), f"boxes are off by up to {distance[inner].max()} pixels"
