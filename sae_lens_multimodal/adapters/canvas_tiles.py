"""Tiles of the canvas whose shape is nearest to the picture's, as InternVL and Aya Vision have them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from sae_lens_multimodal.adapters.family import ImageTokens
from sae_lens_multimodal.adapters.grid import height_width
from sae_lens_multimodal.adapters.processors import image_settings
from sae_lens_multimodal.adapters.tiles import Tile
from sae_lens_multimodal.errors import LayoutError


def canvas_tokens(
    processor: Any,  # noqa: ANN401 - transformers' own
    width: int,
    height: int,
    *,
    side: tuple[int, int],
    patch: int,
    merge: int,
    written: int,
) -> ImageTokens:
    """Return how the tokens of a picture of this size lie in it: tile by tile, then the whole picture.

    Args:
        processor: the processor, whose image part cuts tiles as GOT-OCR 2's does.
        width: of the picture.
        height: of the picture.
        side: (height, width) that the vision tower expects.
        patch: side of a patch in pixels.
        merge: patches along one side of the block that a token stands for.
        written: how many tokens the processor writes for a tile.

    Raises:
        LayoutError: the processor's tiles are not those that the vision tower expects.
    """
    images = image_settings(processor)
    tile = height_width(images.size)
    if tile != side or tile[0] != tile[1]:
        raise LayoutError(
            f"the image processor makes tiles of {tile[0]} x {tile[1]} pixels, the vision tower expects "
            f"{side[0]} x {side[1]}, both square; load them from one checkpoint."
        )
    patches = tile[0] // patch
    if patches % merge or (patches // merge) ** 2 != written:
        raise LayoutError(
            f"tiles of {tile[0]} pixels make {patches} x {patches} patches in blocks of {merge}, but the processor "
            f"writes {written} tokens for each; load them from one checkpoint."
        )
    split = bool(images.crop_to_patches) and images.max_patches > 1
    limits = (int(images.min_patches), int(images.max_patches)) if split else None
    return _tokens(width, height, limits, Tile(tile[0], patches // merge, patch * merge))


@lru_cache(maxsize=256)
def _tokens(width: int, height: int, limits: tuple[int, int] | None, tile: Tile) -> ImageTokens:
    if limits is None:
        return tile.of_picture(width, height, 1, 1)
    columns, rows = get_optimal_tiled_canvas((height, width), (tile.size, tile.size), *limits)
    return tile.of_picture(width, height, rows, columns)
