"""Any-resolution tiles: a base view of the whole picture, and a canvas cut into tiles, as in LLaVA-NeXT and later."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from sae_lens_multimodal.adapters.family import Family, ImageTokens
from sae_lens_multimodal.adapters.grid import (
    boxes_of,
    grid_edges,
    height_width,
    join_views,
    patches_of_view,
    with_row_ends,
)
from sae_lens_multimodal.adapters.hook_points import HookPoint
from sae_lens_multimodal.adapters.modules import (
    LANGUAGE,
    OLD_PATHS,
    PROJECTOR,
    UNEMBEDDING,
    VISION,
    check_strategy,
    llava_hooks,
)
from sae_lens_multimodal.adapters.processors import image_settings
from sae_lens_multimodal.errors import LayoutError


class Anyres(NamedTuple):
    """The numbers that decide where a token lies, from the model's and the processor's configuration."""

    pinpoints: tuple[tuple[int, int], ...]
    """Canvas sizes to choose from, (height, width)."""
    view: int
    """Side of the square that the vision tower sees."""
    cut: int
    """Side of the squares that the canvas is cut into."""
    base: tuple[int, int]
    """(height, width) to which the whole picture is squashed for the base view."""
    resize: tuple[int, int] | None
    """(height, width) to which every square is resized afterwards; None if it is not."""
    crop: bool
    """Whether every square is then cropped to `view` around its centre."""
    patch: int
    grid: int
    """Patches along one side."""

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """Return (height, width) of the canvas on which a picture is put."""
        best = select_best_resolution((height, width), list(self.pinpoints))
        return int(best[0]), int(best[1])

    def n_views(self, width: int, height: int) -> int:
        """Return how many views are made of a picture: its tiles and the base view."""
        canvas_h, canvas_w = self.canvas(width, height)
        return 1 + (canvas_h // self.cut) * (canvas_w // self.cut)


def anyres_of(config: Any, images: Any) -> Anyres:  # noqa: ANN401 - transformers' own
    """Read how an image processor makes views.

    Raises:
        LayoutError: processor and model disagree about the views.
    """
    side = int(config.vision_config.image_size)
    base = height_width(images.size)
    cut = height_width(images.crop_size)[0] if images.crop_size else base[0]
    resize = base if images.do_resize else None
    seen = height_width(images.crop_size) if images.do_center_crop else (resize or (cut, cut))
    if seen != (side, side) or (resize is None and not images.do_center_crop and base != seen):
        raise LayoutError(
            f"the image processor makes views of {seen[0]} x {seen[1]} pixels, the vision tower expects "
            f"{side} x {side}; set the processor's size and crop_size to match."
        )
    pinpoints = tuple((int(height), int(width)) for height, width in images.image_grid_pinpoints)
    expected = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    if pinpoints != expected or cut != side:
        raise LayoutError(
            f"the image processor cuts {list(pinpoints)} into tiles of {cut} pixels, the model expects "
            f"{list(expected)} and {side}; load them from one checkpoint."
        )
    patch = int(config.vision_config.patch_size)
    return Anyres(pinpoints, side, cut, base, resize, bool(images.do_center_crop), patch, side // patch)


class AnyresFamily(Family, ABC):
    """What the families with any-resolution tiles share: modules as in LLaVA, pictures as padded stacks of views."""

    media_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    media_modules: ClassVar[tuple[str, ...]] = (VISION, PROJECTOR)
    old_paths: ClassVar[Mapping[str, str]] = OLD_PATHS
    final_norm: ClassVar[str] = f"{LANGUAGE}.norm"
    unembedding: ClassVar[str] = UNEMBEDDING

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - transformers' own
        """Read the configuration.

        Raises:
            UnsupportedModelError: the configuration is one that transformers itself cannot run.
        """
        super().__init__(config, processor)
        check_strategy(config)

    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""
        return llava_hooks(self.config)

    def geometry(self) -> Anyres:
        """Return how views are made, read anew each time: the processor's settings are the caller's to change.

        Raises:
            LayoutError: processor and vision tower disagree about the size of a view.
        """
        return anyres_of(self.config, image_settings(self.processor))

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the placeholders of a picture of this size lie in it.

        Raises:
            LayoutError: processor and vision tower disagree about the size of a view.
        """
        return anyres_tokens(width, height, self.geometry())

    def merge_media(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Join pixel values, padding the number of tiles, and the rest."""
        present = [dict(batch) for batch in batches if batch.get("pixel_values") is not None]
        most = max((batch["pixel_values"].shape[1] for batch in present), default=0)
        for batch in present:
            pixels = batch["pixel_values"]
            padding = (0, 0) * (pixels.dim() - 2) + (0, most - pixels.shape[1])
            batch["pixel_values"] = torch.nn.functional.pad(pixels, padding)
        return super().merge_media(present)

    def media_rows(self, inputs: Mapping[str, Any]) -> int:
        """Return the number of views of all pictures, padding left out."""
        sizes = inputs.get("image_sizes")
        if sizes is None:
            return 0
        geometry = self.geometry()
        return sum(geometry.n_views(width, height) for height, width in torch.as_tensor(sizes).tolist())

    def picture_sizes(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]] | None:
        """Read the sizes that the model itself needs to arrange tiles."""
        sizes = inputs.get("image_sizes")
        return None if sizes is None else [(width, height) for height, width in torch.as_tensor(sizes).tolist()]

    def scan_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give picture sizes as numbers: how many tiles there are follows from them."""
        sizes = inputs.get("image_sizes")
        return dict(inputs) if sizes is None else {**inputs, "image_sizes": torch.as_tensor(sizes).tolist()}


@lru_cache(maxsize=256)
def anyres_tokens(width: int, height: int, geometry: Anyres) -> ImageTokens:
    """Return the tokens of the base view, then those of the tiles in rows across all of them, with separators."""
    base = patches_of_view(base_boxes(width, height, geometry), 0)
    return join_views(base, with_row_ends(*tile_boxes(width, height, geometry)))


def _patch_edges(g: Anyres, source: tuple[int, int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return [grid, 2] start and stop of the patches along y and x, in pixels of the square before resize and crop.

    Where the crop is larger than the square, patches of the filling around it are empty, at its edges.
    """
    edges = grid_edges(g.grid, g.patch)
    sizes = g.resize or source
    result = []
    for size, original in zip(sizes, source, strict=True):
        offset = (size - g.view) // 2 if g.crop else 0
        result.append(((edges + offset) * (original / size)).clip(0, original))
    return result[0], result[1]


def base_boxes(width: int, height: int, g: Anyres) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Boxes [grid², 4] of the base view, which squashes the whole picture into a square."""
    y, x = _patch_edges(g, g.base)
    y, x = y * (height / g.base[0]), x * (width / g.base[1])
    return boxes_of(y, x, width, height).reshape(-1, 4)


def tile_boxes(
    width: int, height: int, g: Anyres
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Boxes [rows, columns, 4] and tile numbers [rows, columns] of the patches left after unpadding."""
    canvas_h, canvas_w = g.canvas(width, height)
    tiles_y, tiles_x = canvas_h // g.cut, canvas_w // g.cut
    y, x = _patch_edges(g, (g.cut, g.cut))
    y = (y[None] + np.arange(tiles_y)[:, None, None] * g.cut).reshape(-1, 2)
    x = (x[None] + np.arange(tiles_x)[:, None, None] * g.cut).reshape(-1, 2)
    new_h, new_w = _fitted(width, height, canvas_w, canvas_h)
    y = (y - (canvas_h - new_h) // 2) * (height / new_h)
    x = (x - (canvas_w - new_w) // 2) * (width / new_w)
    boxes = boxes_of(y, x, width, height)
    number = 1 + (np.arange(len(y)) // g.grid)[:, None] * tiles_x + (np.arange(len(x)) // g.grid)[None, :]
    cut_y, cut_x = _unpadding(width, height, len(x), len(y))
    rows, columns = slice(cut_y, len(y) - cut_y), slice(cut_x, len(x) - cut_x)
    return boxes[rows, columns], number[rows, columns].astype(np.int64)


def _fitted(width: int, height: int, canvas_w: int, canvas_h: int) -> tuple[int, int]:
    """(height, width) of the picture on the canvas, as the image processor rounds it."""
    scale_w, scale_h = canvas_w / width, canvas_h / height
    if scale_w < scale_h:
        return min(int(np.ceil(height * scale_w)), canvas_h), canvas_w
    return canvas_h, min(int(np.ceil(width * scale_h)), canvas_w)


def _unpadding(width: int, height: int, columns: int, rows: int) -> tuple[int, int]:
    """Whole rows and columns of patches cut off at either side, as transformers' `unpad_image` rounds them."""
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2
