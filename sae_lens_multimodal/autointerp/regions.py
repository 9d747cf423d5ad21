"""Where in a picture a feature fires: connected regions of its tokens, and silent regions of the same size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int64
from PIL import Image

from sae_lens_multimodal.autointerp.drawing import crop, heat_overlay, mark, outline, show, shown_box
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.errors import SelectionError
from sae_lens_multimodal.features.example import Example
from sae_lens_multimodal.types import Box

__all__ = [
    "Region",
    "crop",
    "find_regions",
    "heat_of",
    "heat_overlay",
    "mark",
    "moved_heat",
    "outline",
    "show",
    "silent_region",
]

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
    """Which view of the picture these patches belong to: the finest in which the feature fires there."""
    patch_pixels: float
    """Shorter side of one of its patches, in pixels of the picture."""
    peak: float
    """The strongest activation inside, of either view."""


def find_regions(example: Example, *, threshold: float = 0.5) -> list[Region]:
    """Find the connected regions of pictures in which a feature fires, the strongest first.

    Patches count from `threshold` times the example's strongest image activation on; patches of mere padding, which
    lie nowhere in the picture, do not count at all. Patches of one view are connected where they share an edge; none
    is added. A region of the base view that overlaps patches which fire in the tiles is the same region seen more
    coarsely: it has the extent that the tiles give it, and the strength of the stronger view. What fires in the base
    view alone is a region of its own. Where it is not known which part of a picture its tokens see, its region is all
    of it.

    Args:
        example: one feature on one prompt.
        threshold: share of the example's strongest image activation, above 0 and at most 1.

    Raises:
        SelectionError: the threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise SelectionError(f"threshold is {threshold}; expected a share above 0 and at most 1.")
    values = example.image_values
    has_area = _has_area(np.asarray(example.layout.places[0]))
    peak = float(values[has_area].max(initial=0.0))
    if peak <= 0:
        return []
    counted = (values >= threshold * peak) & has_area
    image_index = np.asarray(example.layout.image_index[0])
    regions = []
    for image in np.unique(image_index[counted]).tolist():
        regions += _of_picture(example, image, np.flatnonzero(counted & (image_index == image)))
    return sorted(regions, key=lambda region: (-region.peak, region.image, region.tokens))


def _of_picture(example: Example, image: int, firing: Int64[np.ndarray, "n"]) -> list[Region]:
    """Make the regions of one picture, of the patches that fire in either view."""
    boxes, tile = np.asarray(example.layout.places[0]), np.asarray(example.layout.tile[0])
    fine, coarse = firing[tile[firing] > 0], firing[tile[firing] == 0]
    overlaps, borders = _meeting(boxes[coarse], boxes[fine])
    same = overlaps | borders
    regions = [
        _region(example, fine[group], image, "tiles", seen_too=coarse[same[:, group].any(axis=1)])
        for group in connected_groups(boxes[fine])
    ]
    kept = []
    for group in connected_groups(boxes[coarse]):
        # of a group that the tiles show too, what lies beside their patches is its blurred edge
        kept += group[~same[group].any(axis=1)].tolist() if overlaps[group].any() else group.tolist()
    alone = coarse[sorted(kept)]
    return regions + [_region(example, alone[group], image, "base") for group in connected_groups(boxes[alone])]


def _region(
    example: Example,
    tokens: Int64[np.ndarray, "n"],
    image: int,
    view: Literal["base", "tiles"],
    *,
    seen_too: Sequence[int] | Int64[np.ndarray, "m"] = (),
) -> Region:
    """Make a region of patches; `seen_too` are those of the other view that show it, too."""
    boxes = np.asarray(example.layout.places[0])[tokens]
    return Region(
        image=image,
        box=example.layout.union_box(tokens),
        tokens=tuple(tokens.tolist()),
        view=view,
        patch_pixels=float(np.median(_sides(boxes).min(axis=1))),
        peak=float(example.image_values[[*tokens, *seen_too]].max()),
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
    touching = np.logical_or(*_meeting(boxes, boxes))
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


def _meeting(
    first: Float[np.ndarray, "n 4"], second: Float[np.ndarray, "m 4"]
) -> tuple[Bool[np.ndarray, "n m"], Bool[np.ndarray, "n m"]]:
    """Tell which pairs overlap, and which share more than a corner of their border only.

    A twentieth of the smallest patch is left for rounding.
    """
    slack = 0.05 * min(float(_sides(boxes).min(initial=np.inf)) for boxes in (first, second))
    low, high = (first[:, None, :2], second[None, :, :2]), (first[:, None, 2:], second[None, :, 2:])
    common = np.minimum(*high) - np.maximum(*low)
    overlaps = np.asarray(common.min(axis=2) > slack)
    touches = np.asarray((common.min(axis=2) >= -slack) & (common.max(axis=2) > slack))
    return overlaps, touches & ~overlaps


def silent_region(
    example: Example,
    region: Region,
    rng: np.random.Generator,
    *,
    margin_pixels: float | None = None,
    silence: float = 0.05,
) -> Region | None:
    """Find a region of the same picture and size in which the feature is silent.

    Every patch that any part of the region shows must be silent, of the view of the whole picture and of its tiles.

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
    picture = example.images[region.image].convert("L")
    places: list[Region] = []
    for x, y in rng.permutation(patch_corners(example, region.image, region.view))[:TRIED_PLACES].tolist():
        place = region_at(example, region, x, y)
        if place is not None and is_silent(example, place, margin_pixels=margin_pixels, limit=silence * region.peak):
            places.append(place)
        if len(places) == KEPT_PLACES:
            break
    if not places:
        return None
    return with_tokens(example, max(places, key=lambda place: detail_in(picture, place.box)))


def region_at(example: Example, region: Region, x: float, y: float) -> Region | None:
    """Move a region's box so that it begins at x, y; None where it would reach over the edge of its picture."""
    width, height = example.layout.image_sizes[0][region.image]
    right, bottom = x + region.box.width, y + region.box.height
    # boxes are float32: one that ends with the picture may lie a hair beyond it
    if right > width + 1e-3 or bottom > height + 1e-3:
        return None
    return replace(region, box=Box(x, y, min(right, width), min(bottom, height)), tokens=(), peak=0.0)


def is_silent(example: Example, region: Region, *, margin_pixels: float | None, limit: float) -> bool:
    """Tell whether no patch of either view that any part of a region or its margin shows fires above a limit."""
    size = example.layout.image_sizes[0][region.image]
    seen = np.array(shown_box(region, size, RegionStyle(margin_pixels=margin_pixels)), dtype=np.float64)
    loud = (example.image_values > limit) & (np.asarray(example.layout.image_index[0]) == region.image)
    boxes = np.asarray(example.layout.places[0], dtype=np.float64)[loud]
    common = np.minimum(boxes[:, 2:], seen[2:]) - np.maximum(boxes[:, :2], seen[:2])
    return not bool((common > 0).all(axis=1).any())


def with_tokens(example: Example, region: Region) -> Region:
    """Name the patches of a region's view that lie at least half inside of its box."""
    tokens = example.layout.tokens_in(region.box, image=region.image, view=region.view)
    return replace(region, tokens=tuple(tokens.tolist()))


def heat_of(example: Example, image: int) -> Float[np.ndarray, "h w"]:
    """Activation over a picture, of its tiles or of the view of the whole, whichever is stronger at each place."""
    strongest: Float[np.ndarray, "h w"] = np.maximum(example.heatmap(image, "base"), example.heatmap(image, "tiles"))
    return strongest


def moved_heat(heat: Float[np.ndarray, "h w"], source: Box, target: Box) -> Float[np.ndarray, "h w"]:
    """Lay the heat of one box over another of the same size, and none anywhere else.

    So a right and a wrong region look alike but for their place.

    Args:
        heat: activation of each pixel of the picture.
        source: the box whose heat is taken.
        target: where it is laid; `source` itself to leave it where it is.
    """
    moved = np.zeros_like(heat)
    x0, y0 = round(source.x0), round(source.y0)
    left, top = round(target.x0), round(target.y0)
    # rounding may push either box a pixel over the edge
    width = min(round(source.width), heat.shape[1] - x0, heat.shape[1] - left)
    height = min(round(source.height), heat.shape[0] - y0, heat.shape[0] - top)
    moved[top : top + height, left : left + width] = heat[y0 : y0 + height, x0 : x0 + width]
    return moved


def patch_corners(example: Example, image: int, view: Literal["base", "tiles"]) -> Float[np.ndarray, "n 2"]:
    """Collect the upper left corners of all patches of one view of a picture: places where a box may begin."""
    return np.asarray(np.unique(_patches(example, image, view)[:, :2], axis=0))


def patch_size(example: Example, image: int, view: Literal["base", "tiles"]) -> Float[np.ndarray, "2"] | None:
    """Give the usual width and height of a patch of one view, in pixels of the picture; None without such a view."""
    boxes = _patches(example, image, view)
    return np.asarray(np.median(_sides(boxes), axis=0)) if len(boxes) else None


def _patches(example: Example, image: int, view: Literal["base", "tiles"]) -> Float[np.ndarray, "n 4"]:
    layout = example.layout
    boxes, tile = np.asarray(layout.places[0], dtype=np.float64), np.asarray(layout.tile[0])
    in_view = (tile > 0) if view == "tiles" else (tile == 0)
    return np.asarray(boxes[(np.asarray(layout.image_index[0]) == image) & in_view & _has_area(boxes)])


def detail_in(grey: Image.Image, box: Box) -> float:
    """Spread of the grey levels inside a box."""
    return float(np.asarray(grey.crop((round(box.x0), round(box.y0), round(box.x1), round(box.y1)))).std())
