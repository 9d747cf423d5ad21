"""Crops such as a region cropper makes: one object with a margin, or only a part of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from sae_lens_multimodal.scenes.world import Scene, SceneObject

MIN_SIDE = 24
"""Smallest side of a crop in pixels."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A cut-out of a scene that shows one object."""

    image: Image.Image = field(repr=False, compare=False)
    box: tuple[int, int, int, int]
    """x0, y0, x1, y1 in pixels of the scene."""
    index: int
    """Which object of the scene it shows."""
    attributes: dict[str, str]
    """What can be seen of the object: kind to value."""


def make_crop(scene: Scene, index: int, rng: np.random.Generator, *, part: bool = False) -> Crop:
    """Cut one object out of its scene.

    Args:
        scene: the scene.
        index: which of its objects.
        rng: source of margin and shift.
        part: cut only a part of the object; shape and glyph then do not count as seen.

    Returns:
        The crop; its box lies within the picture.
    """
    target = scene.objects[index]
    box = _part_box(target, rng) if part else _whole_box(target, rng)
    box = _inside(box, scene.image.size)
    seen = dict(target.attributes)
    if part:
        seen = {kind: value for kind, value in seen.items() if kind in ("colour", "texture")}
    return Crop(image=scene.image.crop(box), box=box, index=index, attributes=seen)


def _whole_box(target: SceneObject, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Put a margin around the object, and shift it within that margin."""
    x0, y0, x1, y1 = target.box
    side = max(x1 - x0, y1 - y0)
    margins = rng.uniform(-0.03, 0.28, size=4) * side
    return x0 - margins[0], y0 - margins[1], x1 + margins[2], y1 + margins[3]


def _part_box(target: SceneObject, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Take a window, about two thirds of the object's width, around its middle."""
    x0, y0, x1, y1 = target.box
    width, height = x1 - x0, y1 - y0
    half = rng.uniform(0.3, 0.42) * max(width, height)
    x = (x0 + x1) / 2 + rng.uniform(-0.22, 0.22) * width
    y = (y0 + y1) / 2 + rng.uniform(-0.22, 0.22) * height
    return x - half, y - half, x + half, y + half


def _inside(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Round a box, widen it to MIN_SIDE and move it into the picture."""
    spans = []
    for low, high, limit in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        missing = max(0.0, MIN_SIDE - (high - low)) / 2
        start, end = max(0, round(low - missing)), min(limit, round(high + missing))
        if end - start < MIN_SIDE:
            start = max(0, min(start, limit - MIN_SIDE))
            end = min(limit, start + MIN_SIDE)
        spans.append((start, end))
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]
