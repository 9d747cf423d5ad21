"""Drawing: outlines, stripes, glyphs and backgrounds as numpy arrays, antialiased by supersampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUPERSAMPLING = 3
"""Sub-pixels a side of every pixel of the finished picture."""

BACKGROUNDS: tuple[str, ...] = ("plain", "gradient", "grain", "blotches")

COLOUR_RGB: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 30),
    "orange": (255, 130, 0),
    "yellow": (250, 235, 40),
    "green": (20, 150, 40),
    "cyan": (40, 220, 225),
    "blue": (30, 50, 215),
    "purple": (175, 35, 200),
    "white": (252, 252, 252),
}
_DARK_INK = frozenset({"orange", "yellow", "cyan", "white"})
_STRIPE_SHADE = 0.28
_STRIPES_ACROSS = 3.2

_GLYPH_STROKES: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "e": (((1, 0), (0, 0), (0, 1), (1, 1)), ((0, 0.5), (0.85, 0.5))),
    "h": (((0, 0), (0, 1)), ((1, 0), (1, 1)), ((0, 0.5), (1, 0.5))),
    "l": (((0.1, 0), (0.1, 1), (1, 1)),),
    "o": (((0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (0.2, 0)),),
    "t": (((0, 0), (1, 0)), ((0.5, 0), (0.5, 1))),
    "v": (((0, 0), (0.5, 1), (1, 0)),),
    "x": (((0, 0), (1, 1)), ((1, 0), (0, 1))),
    "z": (((0, 0), (1, 0), (0, 1), (1, 1)),),
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One object to be drawn; lengths in pixels of the finished picture."""

    colour: str
    shape: str
    texture: str
    glyph: str | None
    centre: tuple[float, float]
    """x, y."""
    diameter: float
    tilt: float
    """Rotation in radians."""
    stripe_angle: float
    """Direction across the stripes, in radians."""


def render(
    size: tuple[int, int], background: str, figures: list[Figure], rng: np.random.Generator
) -> tuple[Image.Image, NDArray[np.int8]]:
    """Draw figures, later ones over earlier ones.

    Args:
        size: width and height in pixels.
        background: one of BACKGROUNDS.
        figures: what to draw.
        rng: source of the background's tones.

    Returns:
        The RGB picture, and an array [H, W] with the index of the figure that owns each pixel (half of it or
        more is covered by that figure), -1 for background.
    """
    width, height = size
    factor = SUPERSAMPLING
    canvas = _background(width, height, background, rng).repeat(factor, axis=0).repeat(factor, axis=1)
    owner = np.full(canvas.shape[:2], -1, dtype=np.int8)
    for index, figure in enumerate(figures):
        _paint(canvas, owner, figure, index)
    fine = canvas.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))
    picture = Image.fromarray(np.clip(fine + 0.5, 0, 255).astype(np.uint8), "RGB")
    return picture, _majority(owner, len(figures), factor)


def _majority(owner: NDArray[np.int8], n_figures: int, factor: int) -> NDArray[np.int8]:
    """Reduce an owner map to whole pixels: the figure that covers at least half of each."""
    height, width = owner.shape[0] // factor, owner.shape[1] // factor
    cells = owner.reshape(height, factor, width, factor)
    out = np.full((height, width), -1, dtype=np.int8)
    for index in range(n_figures):
        out[(cells == index).mean(axis=(1, 3)) >= 0.5] = index
    return out


def _paint(canvas: NDArray[np.float32], owner: NDArray[np.int8], figure: Figure, index: int) -> None:
    """Paint one figure on the supersampled canvas, in place."""
    factor = SUPERSAMPLING
    height, width = owner.shape
    radius = figure.diameter / 2 * factor
    centre_x, centre_y = figure.centre[0] * factor, figure.centre[1] * factor
    x0, x1 = max(0, math.floor(centre_x - radius * 1.3)), min(width, math.ceil(centre_x + radius * 1.3) + 1)
    y0, y1 = max(0, math.floor(centre_y - radius * 1.3)), min(height, math.ceil(centre_y + radius * 1.3) + 1)
    shifted = (centre_x - x0, centre_y - y0)
    stencil = _stencil((x1 - x0, y1 - y0), figure, shifted, radius)
    ink = _ink((x1 - x0, y1 - y0), figure, shifted, radius)
    canvas[y0:y1, x0:x1][stencil] = ink[stencil]
    owner[y0:y1, x0:x1][stencil] = index


def _stencil(size: tuple[int, int], figure: Figure, centre: tuple[float, float], radius: float) -> NDArray[np.bool_]:
    """Fill the outline of a figure: bool [h, w]."""
    layer = Image.new("1", size)
    draw = ImageDraw.Draw(layer)
    if figure.shape == "circle":
        radius *= 0.95
        draw.ellipse((centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius), fill=1)
    else:
        draw.polygon(_outline(figure.shape, centre, radius, figure.tilt), fill=1)
    return np.asarray(layer, dtype=bool)


def _outline(shape: str, centre: tuple[float, float], radius: float, tilt: float) -> list[tuple[float, float]]:
    """Return the corners of a shape; the y axis points down."""
    if shape == "square":
        corners = [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]
    elif shape == "triangle":
        corners = [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)]
    elif shape == "star":
        steps = [(1.08 if k % 2 == 0 else 0.46, math.pi * k / 5) for k in range(10)]
        corners = [(length * math.sin(turn), -length * math.cos(turn)) for length, turn in steps]
    elif shape == "cross":
        a, b = 0.34, 1.0
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a)]
        corners.append((-a, -a))
    else:
        raise ValueError(f"unknown shape {shape!r}")
    cos, sin = math.cos(tilt) * radius, math.sin(tilt) * radius
    return [(centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos) for x, y in corners]


def _ink(size: tuple[int, int], figure: Figure, centre: tuple[float, float], radius: float) -> NDArray[np.float32]:
    """Return the paint of a figure, stripes and glyph included: [h, w, 3]."""
    colour = np.asarray(COLOUR_RGB[figure.colour], dtype=np.float32)
    ink = np.broadcast_to(colour, (size[1], size[0], 3)).copy()
    if figure.texture == "striped":
        y, x = np.mgrid[: size[1], : size[0]].astype(np.float32)
        across = (x - centre[0]) * math.cos(figure.stripe_angle) + (y - centre[1]) * math.sin(figure.stripe_angle)
        ink[np.mod(across * _STRIPES_ACROSS / (2 * radius) + 0.25, 1.0) < 0.5] *= _STRIPE_SHADE
    if figure.glyph is None:
        return ink
    return _with_glyph(ink, figure, centre, radius)


def _with_glyph(
    ink: NDArray[np.float32], figure: Figure, centre: tuple[float, float], radius: float
) -> NDArray[np.float32]:
    """Write a glyph on a plain badge in the middle of a figure."""
    picture = Image.fromarray(ink.astype(np.uint8), "RGB")
    draw = ImageDraw.Draw(picture)
    down = 0.12 * radius if figure.shape == "triangle" else 0.0
    x, y = centre[0], centre[1] + down
    half = 0.30 * radius
    badge = half * 1.5
    draw.rectangle((x - badge, y - badge, x + badge, y + badge), fill=COLOUR_RGB[figure.colour])
    stroke = (10, 10, 10) if figure.colour in _DARK_INK else (255, 255, 255)
    for line in _GLYPH_STROKES[figure.glyph or ""]:
        points = [(x + (2 * u - 1) * half, y + (2 * v - 1) * half) for u, v in line]
        draw.line(points, fill=stroke, width=max(2, round(radius * 0.17)), joint="curve")
    return np.asarray(picture, dtype=np.float32)


def _background(width: int, height: int, kind: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw a muted background, far from every object colour: [H, W, 3] in 0..255."""
    tone = rng.uniform(95, 155) + rng.uniform(-14, 14, size=3)
    plane = np.broadcast_to(tone, (height, width, 3)).astype(np.float32)
    if kind == "plain":
        return plane.copy()
    if kind == "gradient":
        ramp = np.linspace(-22, 22, height)[:, None] * rng.choice((-1, 1)) + np.zeros((1, width))
        return (plane + ramp[..., None]).astype(np.float32)
    if kind == "grain":
        return (plane + rng.normal(0, 9, size=(height, width, 1))).astype(np.float32)
    if kind == "blotches":
        coarse = rng.uniform(-22, 22, size=(max(2, height // 12), max(2, width // 12))).astype(np.float32)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        return (plane + np.asarray(smooth)[..., None]).astype(np.float32)
    raise ValueError(f"unknown background {kind!r}; known: {', '.join(BACKGROUNDS)}")
