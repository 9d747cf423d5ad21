"""Scenes: a few coloured objects on a muted background, made from a seed, with boxes and masks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sae_lens_multimodal.scenes.render import BACKGROUNDS, Figure, render
from sae_lens_multimodal.scenes.words import COLOURS, GLYPHS, SHAPES, TEXTURES, phrase_of

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from numpy.typing import NDArray
    from PIL import Image

MAX_OBJECTS = 5
GLYPH_SHARE = 0.35
"""Share of objects that carry a glyph."""

_ASPECTS: tuple[float, ...] = (1.0, 1.0, 1.2, 1.35, 2.0, 2.1, 3.0)
_MIN_SHORT_SIDE, _MAX_SIDE = 60, 200
_GRIDS: tuple[tuple[int, int], ...] = ((48, 96), (96, 48), (96, 96), (48, 144), (144, 48))


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object of a scene and where it can be seen."""

    colour: str
    shape: str
    texture: str
    glyph: str | None
    box: tuple[int, int, int, int]
    """x0, y0, x1, y1 in pixels of the picture; x1 and y1 are exclusive."""
    mask: NDArray[np.bool_] = field(repr=False, compare=False)
    """Visible pixels, bool [H, W]."""

    @property
    def attributes(self) -> dict[str, str]:
        """Kind to value; "glyph" only where there is one."""
        found = {"colour": self.colour, "texture": self.texture, "shape": self.shape}
        return found if self.glyph is None else {**found, "glyph": self.glyph}

    @property
    def phrase(self) -> str:
        """Colour, texture and shape, such as "red striped circle"."""
        return phrase_of({"colour": self.colour, "texture": self.texture, "shape": self.shape})


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture and everything that is in it."""

    seed: int
    image: Image.Image = field(repr=False, compare=False)
    """RGB."""
    objects: tuple[SceneObject, ...]
    """In the order of COLOURS; no two have the same colour."""
    background: str
    """One of render.BACKGROUNDS."""


def make_scene(
    seed: int,
    *,
    n_objects: int | None = None,
    size: tuple[int, int] | None = None,
    exclude: AbstractSet[tuple[str, str, str]] = frozenset(),
) -> Scene:
    """Make the scene of a seed; the same arguments give the same scene.

    Args:
        seed: any non-negative integer.
        n_objects: 1 to 5; drawn from the seed where None.
        size: width and height in pixels; drawn from the seed where None.
        exclude: combinations (colour, texture, shape) that must not occur.

    Returns:
        The scene, its objects in the order of COLOURS.

    Raises:
        ValueError: n_objects is out of range or size is below 32 pixels a side.
    """
    if n_objects is not None and not 1 <= n_objects <= MAX_OBJECTS:
        raise ValueError(f"n_objects must be 1 to {MAX_OBJECTS}, got {n_objects}")
    if size is not None and min(size) < 32:
        raise ValueError(f"size must be at least 32 pixels a side, got {size}")
    rng = np.random.default_rng(seed)
    count = n_objects if n_objects is not None else int(rng.choice(5, p=(0.2, 0.25, 0.25, 0.18, 0.12))) + 1
    shape = size if size is not None else _draw_size(rng)
    places = _draw_places(rng, shape, count)
    figures = _draw_figures(rng, places, exclude)
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    image, owner = render(shape, background, figures, rng)
    objects = tuple(_seen(figure, owner == index) for index, figure in enumerate(figures))
    return Scene(seed=seed, image=image, objects=objects, background=background)


def _draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Draw width and height so that every anyres grid comes up."""
    aspect = _ASPECTS[rng.integers(len(_ASPECTS))]
    jitter = rng.uniform(0.97, 1.03)
    # the grids of two tiles are the best ones only for exactly twice as long as wide
    aspect *= 1.0 if aspect == 2.0 else jitter
    short = int(rng.integers(_MIN_SHORT_SIDE, max(_MIN_SHORT_SIDE + 1, int(_MAX_SIDE / aspect)) + 1))
    short = min(short, int(_MAX_SIDE / aspect))
    long = round(short * aspect)
    return (long, short) if rng.random() < 0.5 else (short, long)


def _pixels_per_fine_pixel(size: tuple[int, int]) -> float:
    """Return how many picture pixels one pixel of the tiny model's best tile view takes."""
    width, height = size
    return 1 / max(min(grid_w / width, grid_h / height) for grid_h, grid_w in _GRIDS)


def _draw_places(rng: np.random.Generator, size: tuple[int, int], count: int) -> list[tuple[float, float, float]]:
    """Draw centre x, centre y and diameter of every object, none over another."""
    unit = _pixels_per_fine_pixel(size)
    low, high = 24 * unit, min(46 * unit, 0.92 * min(size))
    high = min(high, max(low, 0.95 * math.sqrt(size[0] * size[1] / (count + 0.5))))
    shrink = 1.0
    while True:
        for _ in range(12):
            places = _try_places(rng, size, rng.uniform(low, high, size=count) * shrink)
            if places is not None:
                return places
        shrink *= 0.95


def _try_places(
    rng: np.random.Generator, size: tuple[int, int], diameters: NDArray[np.float64]
) -> list[tuple[float, float, float]] | None:
    """Place every object once, or give up: None."""
    places: list[tuple[float, float, float]] = []
    for diameter in diameters:
        radius = diameter / 2
        for _ in range(12):
            x = rng.uniform(min(radius * 1.05, size[0] / 2), max(size[0] - radius * 1.05, size[0] / 2))
            y = rng.uniform(min(radius * 1.05, size[1] / 2), max(size[1] - radius * 1.05, size[1] / 2))
            if all(max(abs(x - u), abs(y - v)) > 0.98 * (radius + d / 2) for u, v, d in places):
                places.append((float(x), float(y), float(diameter)))
                break
        else:
            return None
    return places


def _draw_figures(
    rng: np.random.Generator, places: list[tuple[float, float, float]], exclude: AbstractSet[tuple[str, str, str]]
) -> list[Figure]:
    """Give every place an object; colours differ and come in the order of COLOURS."""
    colours = sorted(rng.choice(len(COLOURS), size=len(places), replace=False))
    figures = []
    for colour_index, (x, y, diameter) in zip(colours, places, strict=True):
        colour = COLOURS[colour_index]
        while True:
            texture, shape = TEXTURES[rng.integers(len(TEXTURES))], SHAPES[rng.integers(len(SHAPES))]
            if (colour, texture, shape) not in exclude:
                break
        glyph = GLYPHS[rng.integers(len(GLYPHS))] if rng.random() < GLYPH_SHARE else None
        figures.append(
            Figure(
                colour=colour,
                shape=shape,
                texture=texture,
                glyph=glyph,
                centre=(x, y),
                diameter=diameter,
                tilt=float(rng.uniform(-0.15, 0.15)),
                stripe_angle=float(rng.choice((0.25, 0.5, 0.75)) * math.pi),
            )
        )
    return figures


def _seen(figure: Figure, mask: NDArray[np.bool_]) -> SceneObject:
    """Describe a drawn figure by its visible pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return SceneObject(
        colour=figure.colour, shape=figure.shape, texture=figure.texture, glyph=figure.glyph, box=box, mask=mask
    )
