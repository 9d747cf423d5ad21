"""Where in a picture a feature fires: connected regions of its tokens, and silent regions of the same size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int64
from PIL import Image

from sae_lens_multimodal.autointerp.drawing import crop, heat_overlay, mark, outline, show
from sae_lens_multimodal.errors import SelectionError
from sae_lens_multimodal.features.example import Example
from sae_lens_multimodal.types import Box

__all__ = ["Region", "crop", "find_regions", "heat_overlay", "mark", "outline", "show", "silent_region"]

TRIED_PLACES = 200
"""How many places a silent region is looked for at most."""
KEPT_PLACES = 8
"""Among how many silent places the one with the most detail is taken."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of one picture of an example."""

    image: int
    """Which picture of the prompt."""
    box: Box
    """In pixels of the original picture."""
    tokens: tuple[int, ...]
    """Positions of the patches it is made of."""
    view: Literal["base", "tiles"]
    """Which view of the picture these patches belong to."""
    patch_pixels: float
    """Shorter side of one of its patches, in pixels of the picture."""
    peak: float
    """The strongest activation inside."""


def find_regions(example: Example, *, threshold: float = 0.5) -> list[Region]:
    """Find the connected regions of pictures in which a feature fires, the strongest first.

    Patches count from `threshold` times the example's strongest image activation on. In each picture the finest view
    in which any patch counts is used. Patches are connected where they share an edge; none is added.

    Args:
        example: one feature on one prompt.
        threshold: share of the example's strongest image activation, above 0 and at most 1.

    Raises:
        SelectionError: the threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise SelectionError(f"threshold is {threshold}; expected a share above 0 and at most 1.")
    values = example.image_values
    peak = float(values.max(initial=0.0))
    if peak <= 0:
        return []
    boxes = np.asarray(example.layout.boxes[0])
    counted = (values >= threshold * peak) & _has_area(boxes)
    image_index, tile = np.asarray(example.layout.image_index[0]), np.asarray(example.layout.tile[0])
    regions = []
    for image in np.unique(image_index[counted]).tolist():
        here = counted & (image_index == image)
        fine = here & (tile > 0)
        view: Literal["base", "tiles"] = "tiles" if fine.any() else "base"
        tokens = np.flatnonzero(fine if fine.any() else here)
        for group in connected_groups(boxes[tokens]):
            regions.append(_region(example, values, tokens[group], image, view))
    return sorted(regions, key=lambda region: (-region.peak, region.image, region.tokens))


def _region(
    example: Example,
    values: Float[np.ndarray, "seq"],
    tokens: Int64[np.ndarray, "n"],
    image: int,
    view: Literal["base", "tiles"],
) -> Region:
    boxes = np.asarray(example.layout.boxes[0])[tokens]
    return Region(
        image=image,
        box=example.layout.union_box(tokens),
        tokens=tuple(tokens.tolist()),
        view=view,
        patch_pixels=float(np.median(_sides(boxes).min(axis=1))),
        peak=float(values[tokens].max()),
    )


def _sides(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 2"]:
    return np.asarray(boxes[:, 2:] - boxes[:, :2])


def _has_area(boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, "n"]:
    """Tell which tokens have a box with an area; text has none, a patch of mere padding an empty one."""
    with np.errstate(invalid="ignore"):
        return np.asarray((_sides(boxes) > 0).all(axis=1))


def connected_groups(boxes: Float[np.ndarray, "n 4"]) -> list[Int64[np.ndarray, "m"]]:
    """Group boxes that share an edge, directly or through others.

    Args:
        boxes: x0, y0, x1, y1 of each.

    Returns:
        Indices of each group, ascending; groups by their first index.

    Example:
        >>> connected_groups(np.array([[0, 0, 8, 8], [8, 0, 16, 8], [16, 8, 24, 16]], np.float32))
        [array([0, 1]), array([2])]
    """
    touching = _share_edge(boxes)
    group_of = np.full(len(boxes), -1)
    for start in range(len(boxes)):
        if group_of[start] >= 0:
            continue
        frontier = np.zeros(len(boxes), dtype=bool)
        frontier[start] = True
        while frontier.any():
            group_of[frontier] = start
            frontier = touching[frontier].any(axis=0) & (group_of < 0)
    return [np.flatnonzero(group_of == start) for start in np.unique(group_of)]


def _share_edge(boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, "n n"]:
    """Tell which pairs touch along more than a corner; a twentieth of a patch is left for rounding."""
    low, high = boxes[:, :2], boxes[:, 2:]
    slack = 0.05 * float(_sides(boxes).min(initial=np.inf)) if len(boxes) else 0.0
    common = np.minimum(high[:, None], high[None]) - np.maximum(low[:, None], low[None])
    return np.asarray((common.min(axis=2) >= -slack) & (common.max(axis=2) > slack))


def silent_region(
    example: Example,
    region: Region,
    rng: np.random.Generator,
    *,
    margin_pixels: float | None = None,
    silence: float = 0.05,
) -> Region | None:
    """Find a region of the same picture and size in which the feature is silent.

    Of a few places drawn by chance the one with the most detail is taken, so that the wrong region is not told from
    the right one by being empty.

    Args:
        example: one feature on one prompt.
        region: where it fires.
        rng: source of the choice.
        margin_pixels: that of the style it will be shown in: the margin must be silent too.
        silence: share of the region's peak up to which a patch counts as silent.

    Returns:
        The silent region, or None where the picture has none of that size.
    """
    width, height = example.layout.image_sizes[0][region.image]
    margin = region.patch_pixels / 2 if margin_pixels is None else margin_pixels
    loud = np.flatnonzero(example.image_values > silence * region.peak).tolist()
    picture = example.images[region.image].convert("L")
    places = []
    for x, y in rng.permutation(_corners(example, region))[:TRIED_PLACES].tolist():
        box = Box(x, y, x + region.box.width, y + region.box.height)
        seen = (max(x - margin, 0.0), max(y - margin, 0.0), min(box.x1 + margin, width), min(box.y1 + margin, height))
        around = example.layout.tokens_in(seen, image=region.image, min_overlap=0.0, view=region.view)
        if box.x1 <= width and box.y1 <= height and not set(loud).intersection(around.tolist()):
            places.append(box)
        if len(places) == KEPT_PLACES:
            break
    if not places:
        return None
    best = max(places, key=lambda place: _detail(picture, place))
    tokens = example.layout.tokens_in(best, image=region.image, view=region.view)
    return Region(
        image=region.image,
        box=best,
        tokens=tuple(tokens.tolist()),
        view=region.view,
        patch_pixels=region.patch_pixels,
        peak=0.0,
    )


def _corners(example: Example, region: Region) -> Float[np.ndarray, "n 2"]:
    """Collect the upper left corners of all patches of the region's view: places where a box may begin."""
    layout = example.layout
    boxes, tile = np.asarray(layout.boxes[0], dtype=np.float64), np.asarray(layout.tile[0])
    in_view = (tile > 0) if region.view == "tiles" else (tile == 0)
    chosen = (np.asarray(layout.image_index[0]) == region.image) & in_view & _has_area(boxes)
    return np.asarray(np.unique(boxes[chosen][:, :2], axis=0))


def _detail(grey: Image.Image, box: Box) -> float:
    """Spread of the grey levels inside a box."""
    return float(np.asarray(grey.crop((round(box.x0), round(box.y0), round(box.x1), round(box.y1)))).std())
