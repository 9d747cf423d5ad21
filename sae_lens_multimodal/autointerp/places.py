"""Silent regions that lie where firing ones lie, so that no answer is told by its place in the picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from sae_lens_multimodal.autointerp.regions import (
    Region,
    detail_in,
    find_regions,
    is_silent,
    patch_corners,
    patch_size,
    region_at,
    with_tokens,
)
from sae_lens_multimodal.types import Box

if TYPE_CHECKING:
    from sae_lens_multimodal.features.example import Example

SILENCE = 0.05
"""Share of a region's peak up to which a patch counts as silent."""


class Spot(NamedTuple):
    """A region of one example."""

    example: Example
    region: Region

    @property
    def centre(self) -> tuple[float, float]:
        """Where it lies in its picture: its centre, as shares of width and height."""
        width, height = self.example.layout.image_sizes[0][self.region.image]
        box = self.region.box
        return (box.x0 + box.x1) / (2 * width), (box.y0 + box.y1) / (2 * height)


def strongest_spots(examples: Iterable[Example], *, threshold: float = 0.5) -> Iterator[Spot]:
    """Find each example's strongest region; an example without any, such as one that fires on padding, is left out."""
    for example in examples:
        for region in find_regions(example, threshold=threshold)[:1]:
            yield Spot(example, region)


def exchanged(firing: Sequence[Spot], *, margin_pixels: float | None = None) -> list[Region | None]:
    """Give each region a silent one of its own picture and size, at the place where another one of them lies.

    Each place is given away once, and only to a region that gives its own away as well. So over the regions that get a
    silent one both kinds lie at the same places, up to one patch, whatever their pictures have in common. As many as
    possible get one; among the ways to do so that with the most detail in the silent regions is taken, so that they
    are not told by being empty. A region that covers whatever the others cover can get none.

    Args:
        firing: regions of different examples.
        margin_pixels: that of the style they will be shown in: the margin must be silent, too.

    Returns:
        Of each region the silent one, or None.
    """
    found = [[None if one is other else _silent_at(one, other, margin_pixels) for other in firing] for one in firing]
    greys = [one.example.images[one.region.image].convert("L") for one in firing]
    detail = [
        [0.0 if region is None else detail_in(grey, region.box) for region in row]
        for grey, row in zip(greys, found, strict=True)
    ]
    possible = [[region is not None for region in row] for row in found]
    columns = closed_assignment(np.array(detail), np.array(possible, dtype=bool))
    return [None if column is None else found[row][column] for row, column in enumerate(columns)]


def exchanged_pairs(
    firing: Iterable[Spot], count: int, *, margin_pixels: float | None = None
) -> list[tuple[Spot, Region]]:
    """Pair regions with silent ones by `exchanged` until there are so many; those that get none give way to the next.

    Args:
        firing: regions of different examples, in order of preference.
        count: how many pairs at most.
        margin_pixels: that of the style they will be shown in.
    """
    rest = iter(firing)
    pairs: list[tuple[Spot, Region]] = []
    while added := list(islice(rest, count - len(pairs))):
        spots = [*(spot for spot, _ in pairs), *added]
        silent = exchanged(spots, margin_pixels=margin_pixels)
        pairs = [(spot, region) for spot, region in zip(spots, silent, strict=True) if region is not None]
    return pairs


def placed_alike(
    firing: Sequence[Spot], silent: Sequence[Example], *, rng: np.random.Generator, margin_pixels: float | None = None
) -> list[Spot | None]:
    """Give each region one of a picture in which the feature is silent: of as many patches, at the same place.

    Each silent example is used once. Among the ways to pair them that with the most detail in the silent regions is
    taken; that does not choose among places, as the first regions get one as long as there are examples.

    Args:
        firing: regions of any examples.
        silent: examples to take regions from.
        rng: chooses among the pictures of a prompt.
        margin_pixels: that of the style they will be shown in: the margin must be silent, too.

    Returns:
        Of each region the silent one; None where the silent examples are used up, or none has such a region.
    """
    hosts = [(one, int(rng.integers(len(one.images)))) for one in silent if one.images]
    greys = [example.images[image].convert("L") for example, image in hosts]
    found = [
        [_alike_in(example, image, one, margin_pixels) for example, image in hosts] for one in firing[: len(hosts)]
    ]
    gain = [
        [-1.0 if region is None else 1.0 + detail_in(grey, region.box) for grey, region in zip(greys, row, strict=True)]
        for row in found
    ]
    placed: list[Spot | None] = [None] * len(firing)
    if found:
        for row, column in zip(*linear_sum_assignment(np.array(gain), maximize=True), strict=True):
            region = found[row][column]
            placed[row] = None if region is None else Spot(hosts[column][0], region)
    return placed


def closed_assignment(worth: Float[np.ndarray, "n n"], possible: Bool[np.ndarray, "n n"]) -> list[int | None]:
    """Assign as many rows as can be to columns, so that the rows and the columns that are used are the same ones.

    The linear assignment problem, in which whatever is assigned to itself is left out.

    Args:
        worth: of each assignment, 0 or more: as much as the number of assignments allows is gained.
        possible: which assignments are; none to oneself is.

    Returns:
        The column of each row; None for rows that are left out.

    Example:
        >>> possible = np.array([[False, True, True], [True, False, False], [False, False, False]])
        >>> closed_assignment(np.ones((3, 3)), possible)
        [1, 0, None]
    """
    n = len(worth)
    if not n:
        return []
    # all worth together is less than one assignment more; an impossible one costs more than all can gain
    gain = np.where(possible, 1 + worth / (1 + n * worth.max()), -2.0 * n)
    np.fill_diagonal(gain, 0.0)
    rows, columns = linear_sum_assignment(gain, maximize=True)
    return [None if row == column else column for row, column in zip(rows.tolist(), columns.tolist(), strict=True)]


def as_large_in(example: Example, image: int, like: Spot) -> Region | None:
    """Make a region of as many patches of the same view in another picture, at its upper left corner.

    Returns:
        None where that picture has no such view, or is too small.
    """
    own = patch_size(like.example, like.region.image, like.region.view)
    there = patch_size(example, image, like.region.view)
    if own is None or there is None:
        return None
    width, height = np.array([like.region.box.width, like.region.box.height]) / own * there
    size = example.layout.image_sizes[0][image]
    if width > size[0] + 1e-3 or height > size[1] + 1e-3:
        return None
    box = Box(0.0, 0.0, min(float(width), size[0]), min(float(height), size[1]))
    return replace(like.region, image=image, box=box, tokens=(), patch_pixels=float(there.min()))


def _alike_in(example: Example, image: int, like: Spot, margin_pixels: float | None) -> Region | None:
    region = as_large_in(example, image, like)
    return None if region is None else _silent_at(Spot(example, region), like, margin_pixels)


def _silent_at(own: Spot, other: Spot, margin_pixels: float | None) -> Region | None:
    """Move a region to where another lies in its picture, up to one patch; None unless the feature is silent there."""
    example, region = own
    size = example.layout.image_sizes[0][region.image]
    x, y = other.centre
    wanted = np.array([x * size[0] - region.box.width / 2, y * size[1] - region.box.height / 2])
    corners = patch_corners(example, region.image, region.view)
    away = np.abs(corners - wanted).max(axis=1)
    near = np.flatnonzero(away <= region.patch_pixels)
    for left, top in corners[near[np.argsort(away[near], kind="stable")]].tolist():
        place = region_at(example, region, left, top)
        if place is not None and is_silent(example, place, margin_pixels=margin_pixels, limit=SILENCE * region.peak):
            return with_tokens(example, place)
    return None
