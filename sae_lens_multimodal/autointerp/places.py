"""Silent regions that lie where firing ones lie, so that no answer is told by its place in the picture."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Self

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
    from PIL import Image

    from sae_lens_multimodal.features.example import Example

SILENCE = 0.05
"""Share of a region's peak up to which a patch counts as silent."""
POOL = 4
"""Among so many times as many regions as pairs are wanted those are sought that can exchange their places."""
MOST_TRIED = 500
"""So many choices among them are tried at most."""
MOST_UNLIKE = 2.0
"""A region takes the place of one that is at most so many times as wide or high: large ones lie nearer to the edges."""


class Spot(NamedTuple):
    """A region of one example."""

    example: Example
    region: Region

    @property
    def size(self) -> Float[np.ndarray, "2"]:
        """Its width and height, as shares of the picture's."""
        return np.array([self.region.box.width, self.region.box.height]) / self.picture

    @property
    def place(self) -> Float[np.ndarray, "2"]:
        """Where in its picture it lies: which share of the room that it leaves is to the left of it, and above it.

        So regions of any size can lie at the same place; the middle where it leaves no room.
        """
        return np.where(self.room > 1e-3, self.region.box[:2] / np.maximum(self.room, 1e-3), 0.5)

    @property
    def room(self) -> Float[np.ndarray, "2"]:
        """How far it could be moved from one edge to the other, in pixels across and down."""
        return self.picture - (self.region.box.width, self.region.box.height)

    @property
    def picture(self) -> Float[np.ndarray, "2"]:
        """Width and height of its picture."""
        return np.array(self.example.layout.image_sizes[0][self.region.image], dtype=np.float64)


def strongest_spots(examples: Iterable[Example], *, threshold: float = 0.5) -> Iterator[Spot]:
    """Find each example's strongest region; an example without any, such as one that fires on padding, is left out."""
    for example in examples:
        for region in find_regions(example, threshold=threshold)[:1]:
            yield Spot(example, region)


def exchanged(firing: Iterable[Spot], count: int, *, margin_pixels: float | None = None) -> list[tuple[Spot, Region]]:
    """Pair regions with silent ones of their own pictures, as large, that lie at one another's places.

    Each place is given away once, to a region of about the same size that gives its own away as well. So over all pairs
    both kinds lie at the same places, up to half a patch, whatever the pictures have in common. Among the ways to do so
    that with the most detail in the silent regions is taken, so that they are not told by being empty. A region that
    covers whatever the others cover gets no partner; nor do all, where a feature always fires at one place.

    Args:
        firing: regions of different examples, in order of preference.
        count: how many pairs at most, out of the first `POOL` times as many regions.
        margin_pixels: that of the style they will be shown in: the margin must be silent, too.
    """
    spots = list(islice(firing, POOL * count))
    if not spots:
        return []
    hosts = [_Host.of(spot, margin_pixels) for spot in spots]
    moved = [
        [
            host.at(other.place) if other is not host.spot and _about_as_large(host.spot, other) else None
            for other in spots
        ]
        for host in hosts
    ]
    worth = np.array([[host.detail(box) for box in row] for host, row in zip(hosts, moved, strict=True)])
    possible = np.array([[box is not None for box in row] for row in moved], dtype=bool)
    partner = _closed_choice(worth, possible, count)
    pairs = [(host, box) for row, host in enumerate(hosts) if row in partner and (box := moved[row][partner[row]])]
    return [(host.spot, host.region_in(box)) for host, box in pairs]


def _closed_choice(worth: Float[np.ndarray, "n n"], possible: Bool[np.ndarray, "n n"], count: int) -> dict[int, int]:
    """Choose so many rows, or nearly as many, and assign them to one another's columns; the first rows if possible.

    Of all rows that can be assigned the last are left out one by one, as long as the others can do without them; where
    that leads to more rows than wanted of which none can be spared, another one is left out before.
    """

    def assigned(rows: Collection[int]) -> dict[int, int]:
        order = sorted(rows)
        columns = closed_assignment(worth[np.ix_(order, order)], possible[np.ix_(order, order)])
        return {row: order[column] for row, column in zip(order, columns, strict=True) if column is not None}

    open_sets = [frozenset(assigned(range(len(worth))))]
    known, best = set(open_sets), frozenset[int]()
    while open_sets and len(known) < MOST_TRIED and len(best) < count:
        rows = open_sets.pop()
        if len(rows) <= count:
            best = max(best, rows, key=len)
            continue
        # the last to be put on the stack is the next to be tried: that without the last row
        smaller = [frozenset(assigned(rows - {row})) for row in sorted(rows)]
        open_sets += sorted((one for one in smaller if one not in known), key=len)
        known.update(smaller)
    return assigned(best)


def placed_alike(
    firing: Sequence[Spot], silent: Sequence[Example], *, rng: np.random.Generator, margin_pixels: float | None = None
) -> list[Spot | None]:
    """Give each region one of a picture in which the feature is silent: as large a part of it, at the same place.

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
    tried = [[_alike_in(*host, one, margin_pixels) for host in hosts] for one in firing[: len(hosts)]]
    worth = np.array([[-1.0 if one is None else one[0].detail(one[1]) for one in row] for row in tried])
    placed: list[Spot | None] = [None] * len(firing)
    if tried:
        for row, column in zip(*linear_sum_assignment(_gain(worth, worth >= 0, -1.0), maximize=True), strict=True):
            if (found := tried[row][column]) is not None:
                host, box = found
                placed[row] = Spot(host.spot.example, host.region_in(box))
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
    # an impossible assignment costs more than all can gain
    gain = _gain(worth, possible, -2.0 * n)
    np.fill_diagonal(gain, 0.0)
    rows, columns = linear_sum_assignment(gain, maximize=True)
    return [None if row == column else column for row, column in zip(rows.tolist(), columns.tolist(), strict=True)]


def _gain(worth: Float[np.ndarray, "n m"], possible: Bool[np.ndarray, "n m"], otherwise: float) -> np.ndarray:
    """Let every possible assignment count more than all worth together."""
    return np.where(possible, 1 + worth / (1 + len(worth) * worth.max()), otherwise)


def as_large_in(example: Example, image: int, like: Spot) -> Region | None:
    """Make a region of the same shape and as large a part of another picture as one is of its own.

    In whole patches, as regions are, and at the upper left corner.

    Returns:
        None where that picture has no such view.
    """
    patch = patch_size(example, image, like.region.view)
    if patch is None:
        return None
    picture = np.array(example.layout.image_sizes[0][image], dtype=np.float64)
    # as wide a share of a wide picture as of a narrow one would be another shape, and things have shapes of their own
    scale = np.sqrt(picture.prod() / like.picture.prod())
    pixels = scale * np.array([like.region.box.width, like.region.box.height])
    width, height = np.minimum(np.maximum(np.round(pixels / patch), 1) * patch, picture).tolist()
    box = Box(0.0, 0.0, width, height)
    return replace(like.region, image=image, box=box, tokens=(), patch_pixels=float(patch.min()))


def _alike_in(example: Example, image: int, like: Spot, margin_pixels: float | None) -> tuple[_Host, Box] | None:
    region = as_large_in(example, image, like)
    if region is None:
        return None
    host = _Host.of(Spot(example, region), margin_pixels)
    box = host.at(like.place)
    return None if box is None else (host, box)


def _about_as_large(one: Spot, other: Spot) -> bool:
    ratio = one.size / other.size
    return bool(np.maximum(ratio, 1 / ratio).max() <= MOST_UNLIKE)


@dataclass(frozen=True)
class _Host:
    """A picture in which a region is to be moved."""

    spot: Spot
    corners: Float[np.ndarray, "n 2"]
    """Of the patches where the region can begin without reaching over the edge."""
    margin_pixels: float | None

    @classmethod
    def of(cls, spot: Spot, margin_pixels: float | None) -> Self:
        corners = patch_corners(spot.example, spot.region.image, spot.region.view)
        return cls(spot, corners[(corners <= spot.room + 1e-3).all(axis=1)], margin_pixels)

    def at(self, place: Float[np.ndarray, "2"]) -> Box | None:
        """Move the region to the patch nearest to a place; None unless the feature is silent there.

        Silent places farther off are no choice: as the feature fires on its own, they would lie more to the outside.
        """
        away = np.abs(self.corners - place * self.spot.room).max(axis=1, initial=0.0)
        region = self.spot.region
        if not len(away) or away.min() > region.patch_pixels:
            return None
        moved = region_at(self.spot.example, region, *self.corners[int(away.argmin())].tolist())
        limit = SILENCE * region.peak
        if moved is None or not is_silent(self.spot.example, moved, margin_pixels=self.margin_pixels, limit=limit):
            return None
        return moved.box

    def detail(self, box: Box | None) -> float:
        """Spread of the grey levels inside a box."""
        return 0.0 if box is None else detail_in(self._grey, box)

    def region_in(self, box: Box) -> Region:
        """Make the silent region in a box."""
        return with_tokens(self.spot.example, replace(self.spot.region, box=box, peak=0.0))

    @cached_property
    def _grey(self) -> Image.Image:
        return self.spot.example.images[self.spot.region.image].convert("L")
