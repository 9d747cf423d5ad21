"""Drawing regions: cut out, dimmed around, outlined, side by side with their picture, and as a heat map."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageEnhance

from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.errors import SelectionError
from sae_lens_multimodal.types import Box

OUTLINE_COLOURS = ((255, 255, 255), (0, 0, 0))
"""Outer and inner line: one of them stands out on any ground."""

GROUND = (128, 128, 128)
"""What lies around a cut-out that is lower than the picture beside it."""

_CIVIDIS = np.array(
    [
        (0, 34, 78),
        (18, 53, 112),
        (59, 73, 108),
        (87, 93, 109),
        (112, 113, 115),
        (138, 134, 120),
        (165, 156, 116),
        (195, 179, 105),
        (225, 204, 85),
        (254, 232, 56),
    ],
    dtype=np.float64,
)
"""The colour map cividis at ten even steps: it looks the same to people with and without colour blindness."""


class HasBox(Protocol):
    """What the drawing functions need to know of a region."""

    @property
    def box(self) -> Box:
        """In pixels of the original picture."""

    @property
    def patch_pixels(self) -> float:
        """Shorter side of a patch, in pixels of the picture."""


def shown_box(region: HasBox, size: tuple[int, int], style: RegionStyle) -> tuple[int, int, int, int]:
    """Give the whole pixels that a crop shows: the region and its margin, as far as the picture reaches."""
    margin = style.for_patches(region.patch_pixels).margin_pixels or 0.0
    x0, y0, x1, y1 = region.box
    # a box from float32 may lie a hair beyond a whole pixel
    left, top = max(0, math.floor(x0 - margin + 1e-3)), max(0, math.floor(y0 - margin + 1e-3))
    right, bottom = min(size[0], math.ceil(x1 + margin - 1e-3)), min(size[1], math.ceil(y1 + margin - 1e-3))
    if right <= left or bottom <= top:
        raise SelectionError(f"the box {tuple(region.box)} lies outside of a picture of {size[0]} x {size[1]} pixels.")
    return left, top, right, bottom


def crop(picture: Image.Image, region: HasBox, style: RegionStyle) -> Image.Image:
    """Cut out a region with its margin; enlarge it if it is smaller than the style's least side.

    Raises:
        SelectionError: the region lies outside of the picture.
    """
    return enlarged(picture.crop(shown_box(region, picture.size, style)), style.min_side_pixels)


def enlarged(image: Image.Image, min_side_pixels: int) -> Image.Image:
    """Enlarge an image if its shorter side is shorter than that."""
    scale = min_side_pixels / min(image.size)
    return image if scale <= 1 else _scaled(image, scale)


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def dim(picture: Image.Image, region: HasBox, style: RegionStyle) -> Image.Image:
    """Darken everything but a region and its margin."""
    box = shown_box(region, picture.size, style)
    dimmed = ImageEnhance.Brightness(picture).enhance(style.dimmed_to)
    dimmed.paste(picture.crop(box), box[:2])
    return dimmed


def outline(picture: Image.Image, region: HasBox, style: RegionStyle) -> Image.Image:
    """Draw a box around a region and its margin, on a copy."""
    drawn = picture.copy()
    pen = ImageDraw.Draw(drawn)
    x0, y0, x1, y1 = shown_box(region, picture.size, style)
    width = max(1, round(min(picture.size) / 200))
    for step, colour in enumerate(OUTLINE_COLOURS):
        inset = step * width
        if x1 - x0 > 2 * inset + width and y1 - y0 > 2 * inset + width:
            pen.rectangle((x0 + inset, y0 + inset, x1 - 1 - inset, y1 - 1 - inset), outline=colour, width=width)
    return drawn


def mark(picture: Image.Image, region: HasBox, style: RegionStyle) -> Image.Image:
    """Show a region in its picture: outlined, all else dimmed."""
    return outline(dim(picture, region, style), region, style)


def side_by_side(picture: Image.Image, region: HasBox, style: RegionStyle) -> Image.Image:
    """Show the whole picture with a region outlined, and the region cut out beside it as large as fits: one image."""
    whole = outline(picture, region, style).convert("RGB")
    cut = picture.convert("RGB").crop(shown_box(region, picture.size, style))
    cut = _scaled(cut, min(whole.width / cut.width, whole.height / cut.height))
    gap = max(2, round(whole.width / 50))
    both = Image.new("RGB", (whole.width + gap + cut.width, whole.height), GROUND)
    both.paste(whole, (0, 0))
    both.paste(cut, (whole.width + gap, (whole.height - cut.height) // 2))
    return enlarged(both, style.min_side_pixels)


def show(
    picture: Image.Image, region: HasBox, style: RegionStyle, *, heat: Float[np.ndarray, "h w"] | None = None
) -> list[Image.Image]:
    """Show a region as the style says: one image, or for `both` the crop and then the marked picture.

    Args:
        picture: the whole picture.
        region: which part of it.
        style: how.
        heat: activation of each pixel; only the view "heat" needs it.

    Raises:
        SelectionError: the region lies outside of the picture, or the view "heat" got no heat map of its size.
    """
    if style.view == "heat":
        if heat is None:
            raise SelectionError("the view 'heat' got no heat map; give one, or choose another view.")
        return [heat_overlay(picture, heat)]
    return [draw(picture, region, style) for draw in _DRAWN[style.view]]


_DRAWN = {
    "crop": (crop,),
    "outlined": (outline,),
    "dimmed": (dim,),
    "marked": (mark,),
    "both": (crop, mark),
    "side_by_side": (side_by_side,),
}
"""What each view but the heat map consists of."""


def colours(values: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Map values from 0 to 1 to colours that do not depend on telling red from green.

    Example:
        >>> colours(np.array([[0.0, 1.0]])).tolist()
        [[[0, 34, 78], [254, 232, 56]]]
    """
    places = np.clip(values, 0.0, 1.0) * (len(_CIVIDIS) - 1)
    steps = np.arange(len(_CIVIDIS))
    channels = [np.interp(places, steps, _CIVIDIS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def heat_overlay(
    picture: Image.Image,
    heat: Float[np.ndarray, "h w"],
    *,
    peak: float | None = None,
    opacity: tuple[float, float] = (0.25, 0.75),
) -> Image.Image:
    """Lay a feature's activation over a picture in colour.

    Args:
        picture: RGB, as large as the heat map.
        heat: activation of each pixel, as `Example.heatmap` gives it.
        peak: activation that gets the brightest colour. None: the map's own maximum.
        opacity: of the colour where the feature is silent, and where it is at its peak.

    Raises:
        SelectionError: picture and heat map differ in size.
    """
    if heat.shape != (picture.height, picture.width):
        raise SelectionError(
            f"the heat map is {heat.shape[1]} x {heat.shape[0]}, the picture {picture.width} x {picture.height}."
        )
    top = float(heat.max(initial=0.0)) if peak is None else peak
    share = np.clip(heat / top, 0.0, 1.0) if top > 0 else np.zeros_like(heat)
    alpha = (opacity[0] + (opacity[1] - opacity[0]) * share)[..., None]
    mixed = (1 - alpha) * np.asarray(picture.convert("RGB"), dtype=np.float64) + alpha * colours(share)
    return Image.fromarray(mixed.round().astype(np.uint8))
