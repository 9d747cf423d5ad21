"""Boxes of patches on a regular grid: edges along each side, carried back through resizing, cropping and padding."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float64

from sae_lens_multimodal.adapters.family import ImageTokens
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
