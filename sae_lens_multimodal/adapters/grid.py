"""Boxes of patches on a regular grid: edges along each side, carried back through resizing, cropping and padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float64

from sae_lens_multimodal.adapters.family import ImageTokens
from sae_lens_multimodal.errors import LayoutError
from sae_lens_multimodal.types import Modality

Edges: TypeAlias = Float64[np.ndarray, "n 2"]
"""Start and stop of each patch along one side."""


def grid_edges(count: int, size: float) -> Edges:
    """Return the edges of `count` patches of one size that begin at 0."""
    starts = np.arange(count, dtype=np.float64) * size
    return np.stack([starts, starts + size], axis=1)


def before_resize(edges: Edges, original: float, resized: float) -> Edges:
    """Carry edges in a resized picture back to the picture before."""
    return edges * (original / resized)


def boxes_of(y: Edges, x: Edges, width: int, height: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Combine edges along y and x to boxes [rows, columns, 4], cut off at the picture's edges."""
    y, x = y.clip(0, height), x.clip(0, width)
    boxes = np.empty((len(y), len(x), 4), dtype=np.float32)
    boxes[..., 0], boxes[..., 2] = x[None, :, 0], x[None, :, 1]
    boxes[..., 1], boxes[..., 3] = y[:, None, 0], y[:, None, 1]
    return boxes


def whole_picture(y: Edges, x: Edges, width: int, height: int, *, inexact: str = "") -> ImageTokens:
    """Return the tokens of a single view, row by row, from the edges of its patches in the original."""
    return patches_of_view(boxes_of(y, x, width, height).reshape(-1, 4), 0, inexact=inexact)


def patches_of_view(boxes: np.ndarray[Any, Any], tile: int, *, inexact: str = "") -> ImageTokens:
    """Return the tokens of one view, all of which are patches."""
    return ImageTokens(
        modality=np.full(len(boxes), Modality.IMAGE, dtype=np.int8),
        boxes=boxes.astype(np.float32),
        tile=np.full(len(boxes), tile, dtype=np.int64),
        inexact=inexact,
    )


def join_views(*views: ImageTokens) -> ImageTokens:
    """Join the tokens of several views of one picture in the order of the sequence."""
    return ImageTokens(
        modality=np.concatenate([view.modality for view in views]),
        boxes=np.concatenate([view.boxes for view in views]),
        tile=np.concatenate([view.tile for view in views]),
        inexact=next((view.inexact for view in views if view.inexact), ""),
    )


def with_row_ends(boxes: np.ndarray[Any, Any], tile: np.ndarray[Any, Any]) -> ImageTokens:
    """Return the tokens of patches in rows, boxes [rows, columns, 4], with a separator after each row."""
    rows, columns = tile.shape
    lined = np.full((rows, columns + 1, 4), np.nan, dtype=np.float32)
    lined[:, :columns] = boxes
    numbers = np.full((rows, columns + 1), -1, dtype=np.int64)
    numbers[:, :columns] = tile
    kinds = np.full((rows, columns + 1), Modality.NEWLINE, dtype=np.int8)
    kinds[:, :columns] = Modality.IMAGE
    return ImageTokens(modality=kinds.reshape(-1), boxes=lined.reshape(-1, 4), tile=numbers.reshape(-1))


def height_width(size: Any) -> tuple[int, int]:  # noqa: ANN401 - a dict or transformers' SizeDict
    """Read a processor's size; `shortest_edge` gives both sides where height and width are not given."""
    given: dict[str, int] = {key: value for key, value in dict(size).items() if value is not None}
    edge = given.get("shortest_edge", 0)
    return int(given.get("height", edge)), int(given.get("width", edge))


@dataclass(frozen=True, kw_only=True)
class View:
    """How an image processor turns a whole picture into the one view that the vision tower sees."""

    pad_to_square: bool = False
    """Whether the picture is first put into the middle of a square."""
    shortest_edge: int | None = None
    """To what the shorter side is resized, the other one along with it."""
    size: tuple[int, int] | None = None
    """(height, width) to which the picture is resized, whatever its shape."""
    crop: tuple[int, int] | None = None
    """(height, width) that is then cut out around the centre, filled up where the picture is smaller."""
    patch: int

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (height, width) after resizing what was (width, height)."""
        if self.shortest_edge is not None:
            # as transformers' `get_resize_output_image_size` rounds it
            longer = int(self.shortest_edge * max(width, height) / min(width, height))
            return (longer, self.shortest_edge) if width <= height else (self.shortest_edge, longer)
        return self.size or (height, width)

    def edges(self, width: int, height: int) -> tuple[Edges, Edges]:
        """Return the edges of the patches along y and x in pixels of a picture of (width, height)."""
        padded = (max(width, height), max(width, height)) if self.pad_to_square else (height, width)
        resized = self.resized(padded[1], padded[0])
        result = []
        for axis, length in enumerate((height, width)):
            seen = self.crop[axis] if self.crop else resized[axis]
            cut = (resized[axis] - seen) // 2
            before = before_resize(grid_edges(seen // self.patch, self.patch) + cut, padded[axis], resized[axis])
            result.append(before - (padded[axis] - length) // 2)
        return result[0], result[1]

    def tokens(self, width: int, height: int) -> ImageTokens:
        """Return the tokens of a picture of (width, height), one for each patch, row by row."""
        return whole_picture(*self.edges(width, height), width, height)


def view_of(images: Any, side: int, patch: int) -> View:  # noqa: ANN401 - transformers' own
    """Read from an image processor like CLIP's, SigLIP's or LLaVA's how it makes a view.

    Args:
        images: the image processor.
        side: side of the square that the vision tower expects.
        patch: side of its patches.

    Raises:
        LayoutError: the processor makes views of another size, or in a way that is not known here.
    """
    kind = type(images).__name__.removesuffix("Pil").removesuffix("Fast")
    if images.do_pad and kind != "LlavaImageProcessor":
        raise LayoutError(
            f"a {kind} with do_pad=True fills up views in a way that is not known here; set do_pad=False."
        )
    size = dict(images.size) if images.do_resize else {}
    view = View(
        pad_to_square=bool(images.do_pad),
        shortest_edge=size.get("shortest_edge"),
        size=None if size.get("height") is None else height_width(size),
        crop=height_width(images.crop_size) if images.do_center_crop else None,
        patch=patch,
    )
    of_one_size = view.size or (view.pad_to_square and view.shortest_edge)
    square = view.crop or (view.resized(side, side) if of_one_size else None)
    if square != (side, side):
        raise LayoutError(
            f"the image processor makes views of {square or 'many sizes'}, the vision tower expects {(side, side)}; "
            "set the processor's size and crop_size to match."
        )
    return view
