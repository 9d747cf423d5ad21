"""Where every token lies: its modality, its picture, and its box in pixels of the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int8, Int64
from PIL import Image
from torch import Tensor

from sae_lens_multimodal.errors import LayoutError, SelectionError
from sae_lens_multimodal.types import Box, Modality

View: TypeAlias = Literal["finest", "base", "tiles"]
"""Which tokens speak for a place that several cover: the tiles where they reach, the whole-picture view, the tiles."""

ARRAY_NAMES = ("modality", "boxes", "image_index", "tile", "image_sizes")


@dataclass(frozen=True)
class TokenLayout:
    """What each position of a batch is, and where it lies. Nothing else in the package computes geometry."""

    modality: Int8[Tensor, "batch seq"]
    """`Modality` of each position."""
    boxes: Float[Tensor, "batch seq 4"]
    """`x0, y0, x1, y1` in pixels of the original picture; NaN where the modality is not IMAGE.

    Patches that see nothing but padding have an empty box on the picture's edge."""
    image_index: Int64[Tensor, "batch seq"]
    """Which picture of the prompt the position belongs to; -1 where none."""
    tile: Int64[Tensor, "batch seq"]
    """0 in the view of the whole picture, 1 and up in its tiles; -1 where none."""
    image_sizes: tuple[tuple[tuple[int, int], ...], ...]
    """For each row, the (width, height) of its pictures."""
    inexact: tuple[tuple[str, ...], ...] = ()
    """For each row and picture, why some of its tokens have no exact place, such as pooling; empty where all have."""

    @property
    def n_rows(self) -> int:
        """Number of prompts."""
        return int(self.modality.shape[0])

    @property
    def n_tokens(self) -> int:
        """Number of positions of each row, padding included."""
        return int(self.modality.shape[1])

    @property
    def is_image(self) -> Bool[Tensor, "batch seq"]:
        """Positions that are a patch of a picture."""
        return self.modality == Modality.IMAGE

    @property
    def is_text(self) -> Bool[Tensor, "batch seq"]:
        """Positions that are ordinary text."""
        return self.modality == Modality.TEXT

    @property
    def kept(self) -> Bool[Tensor, "batch seq"]:
        """Positions that are image or text: neither separator, nor control token, nor padding."""
        return self.is_image | self.is_text

    @property
    def places(self) -> Float[Tensor, "batch seq 4"]:
        """The boxes, and the whole picture for those of its tokens whose own place is not known."""
        places = self.boxes.clone()
        for row, index in (self.is_image & self.boxes.isnan().any(-1)).nonzero().tolist():
            places[row, index] = torch.tensor((0, 0, *self.image_sizes[row][int(self.image_index[row, index])]))
        return places

    def row(self, index: int) -> TokenLayout:
        """Return the layout of one prompt, still with a batch dimension of one."""
        index = self._check_row(index)
        rows = slice(index, index + 1)
        return TokenLayout(
            modality=self.modality[rows],
            boxes=self.boxes[rows],
            image_index=self.image_index[rows],
            tile=self.tile[rows],
            image_sizes=(self.image_sizes[index],),
            inexact=self.inexact[index : index + 1],
        )

    def tokens_in(
        self,
        box: Box | tuple[float, float, float, float],
        *,
        row: int = 0,
        image: int = 0,
        min_overlap: float = 0.5,
        view: Literal["all", "base", "tiles"] = "all",
    ) -> Int64[Tensor, " found"]:
        """Return the positions whose patch lies at least `min_overlap` (share of its own area) within `box`.

        Raises:
            SelectionError: the box is empty, the row has no such picture, or it is not known where its tokens lie and
                the box does not hold all of it.
        """
        x0, y0, x1, y1 = (float(value) for value in box)
        if not (x1 > x0 and y1 > y0):
            raise SelectionError(f"got the box {tuple(box)}; expected x0 < x1 and y0 < y1, in pixels.")
        row = self._check_row(row)
        full = self._check_image(row, image)
        unknown = self.is_image[row] & self._of_image(row, image) & self.boxes[row].isnan().any(-1)
        if bool(unknown.any()) and not (x0 <= 0 and y0 <= 0 and x1 >= full[0] and y1 >= full[1]):
            raise SelectionError(
                f"it is not known where the tokens of picture {image} lie: {self._why(row, image)}; choose them "
                "without a box, such as tokens='image'."
            )
        boxes = self.row(row).places[0].double()
        width = (boxes[:, 2].clamp(max=x1) - boxes[:, 0].clamp(min=x0)).clamp(min=0)
        height = (boxes[:, 3].clamp(max=y1) - boxes[:, 1].clamp(min=y0)).clamp(min=0)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        share = torch.where(area > 0, width * height / area, torch.zeros_like(area))
        # boxes are float32: a share that is exactly at the limit must not fall to rounding
        inside = (share > 0) & (share >= min_overlap - 1e-6) & self._of_image(row, image)
        if view != "all":
            inside &= (self.tile[row] == 0) if view == "base" else (self.tile[row] > 0)
        return inside.nonzero()[:, 0]

    def heatmap(
        self,
        values: Float[Tensor, " seq"] | np.ndarray[Any, Any],
        *,
        row: int = 0,
        image: int = 0,
        view: View = "finest",
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Paint one value per position over the original picture: float32 [height, width], 0 where no token lies.

        A pixel that several patches share takes their mean, weighted by how much of it each covers. Tokens of unknown
        place cover the whole picture.

        Raises:
            SelectionError: the number of values is not the number of positions, or the row has no such picture.
        """
        row = self._check_row(row)
        width, height = self._check_image(row, image)
        numbers = _to_numpy(values)
        if numbers.shape != (self.n_tokens,):
            raise SelectionError(f"got values of shape {numbers.shape}; expected one per position, ({self.n_tokens},).")
        mine = self._of_image(row, image).numpy()
        tile = self.tile[row].numpy()
        boxes = self.row(row).places[0].double().numpy()
        base, base_cover = _paint(boxes[mine & (tile == 0)], numbers[mine & (tile == 0)], width, height)
        if view == "base":
            return base
        tiles, cover = _paint(boxes[mine & (tile > 0)], numbers[mine & (tile > 0)], width, height)
        if view == "tiles":
            return tiles
        if view == "finest":
            return np.where(cover > 0, tiles, np.where(base_cover > 0, base, np.float32(0)))
        raise SelectionError(f"got view={view!r}; expected 'finest', 'base' or 'tiles'.")

    def union_box(self, tokens: Int[Tensor, " n"] | list[int] | np.ndarray[Any, Any], *, row: int = 0) -> Box:
        """Return the smallest box that holds the patches at these positions: the picture, where their place is unknown.

        Raises:
            SelectionError: no positions, positions that are no patch of a picture, or patches of several pictures.
        """
        row = self._check_row(row)
        index = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)
        if index.numel() == 0:
            raise SelectionError("got no tokens; expected at least one image token.")
        if int(index.min()) < 0 or int(index.max()) >= self.n_tokens:
            raise SelectionError(f"got tokens {index.min()}…{index.max()}; expected 0…{self.n_tokens - 1}.")
        pictures = sorted(set(self.image_index[row][index].tolist()))
        if not bool(self.is_image[row][index].all()) or len(pictures) != 1:
            raise SelectionError(
                f"got {index.numel()} tokens of the pictures {pictures}; expected image tokens of one picture."
            )
        boxes = self.row(row).places[0][index]
        low, high = boxes[:, :2].amin(0).tolist(), boxes[:, 2:].amax(0).tolist()
        return Box(low[0], low[1], high[0], high[1])

    def crop(
        self,
        picture: Image.Image,
        tokens: Int[Tensor, " n"] | list[int] | np.ndarray[Any, Any],
        *,
        row: int = 0,
        margin: float = 0.0,
        min_size: int = 0,
    ) -> Image.Image:
        """Cut out the region of these positions.

        Args:
            picture: the original picture, as it was given to `encode`.
            tokens: positions of one picture's patches.
            row: which prompt.
            margin: how much to add on every side, as a share of the region's longer side.
            min_size: the least width and height in pixels, as far as the picture reaches.

        Raises:
            SelectionError: as `union_box`.
            LayoutError: the picture is not the one the tokens were made from.
        """
        box = self.union_box(tokens, row=row)
        first = int(torch.as_tensor(tokens).reshape(-1)[0])
        size = self.image_sizes[self._check_row(row)][int(self.image_index[row, first])]
        if picture.size != size:
            raise LayoutError(f"the picture is {picture.size} pixels; the tokens were made from one of {size}.")
        left, right = _widen(box.x0, box.x1, margin * max(box.width, box.height), min_size, size[0])
        top, bottom = _widen(box.y0, box.y1, margin * max(box.width, box.height), min_size, size[1])
        return picture.crop((left, top, right, bottom))

    def to_arrays(self, *, row: int = 0) -> dict[str, np.ndarray[Any, Any]]:
        """Return one prompt's layout as numpy arrays, for storing; `from_arrays` reads them back."""
        row = self._check_row(row)
        return {
            "modality": self.modality[row].numpy(),
            "boxes": self.boxes[row].numpy(),
            "image_index": self.image_index[row].numpy(),
            "tile": self.tile[row].numpy(),
            "image_sizes": np.asarray(self.image_sizes[row], dtype=np.int64).reshape(-1, 2),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> TokenLayout:
        """Build the layout of one prompt from what `to_arrays` gave.

        Raises:
            LayoutError: an array is missing, or they do not fit together.
        """
        missing = [name for name in ARRAY_NAMES if name not in arrays]
        if missing:
            raise LayoutError(f"the stored layout lacks {', '.join(missing)}; expected {', '.join(ARRAY_NAMES)}.")
        # copies: stored arrays may be read-only views of a file
        modality = torch.tensor(np.asarray(arrays["modality"]), dtype=torch.int8).reshape(1, -1)
        boxes = torch.tensor(np.asarray(arrays["boxes"], dtype=np.float32)).reshape(1, -1, 4)
        image_index = torch.tensor(np.asarray(arrays["image_index"]), dtype=torch.int64).reshape(1, -1)
        tile = torch.tensor(np.asarray(arrays["tile"]), dtype=torch.int64).reshape(1, -1)
        if len({modality.shape[1], boxes.shape[1], image_index.shape[1], tile.shape[1]}) != 1:
            raise LayoutError("the stored layout's arrays have different lengths; the file may be damaged.")
        sizes = np.asarray(arrays["image_sizes"], dtype=np.int64).reshape(-1, 2).tolist()
        return cls(modality, boxes, image_index, tile, (tuple((width, height) for width, height in sizes),))

    def _why(self, row: int, image: int) -> str:
        noted = self.inexact[row][image] if row < len(self.inexact) else ""
        return noted or "they have no boxes"

    def _of_image(self, row: int, image: int) -> Bool[Tensor, " seq"]:
        return self.is_image[row] & (self.image_index[row] == image)

    def _check_row(self, row: int) -> int:
        if not -self.n_rows <= row < self.n_rows:
            raise SelectionError(f"got row {row}; the batch has {self.n_rows} rows.")
        return row % self.n_rows

    def _check_image(self, row: int, image: int) -> tuple[int, int]:
        sizes = self.image_sizes[row]
        if not 0 <= image < len(sizes):
            raise SelectionError(f"got picture {image}; row {row} has {len(sizes)} pictures.")
        return sizes[image]


def _to_numpy(values: Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if isinstance(values, Tensor):
        return values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float32)


def _paint(
    boxes: np.ndarray[Any, Any], values: np.ndarray[Any, Any], width: int, height: int
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, Any]]:
    """Return the coverage-weighted mean of the values on the pixel grid, and the coverage."""
    total = np.zeros((height, width))
    cover = np.zeros((height, width))
    for (x0, y0, x1, y1), value in zip(boxes, values, strict=True):
        if x1 <= x0 or y1 <= y0:
            continue
        columns, across = _pixel_shares(x0, x1, width)
        rows, down = _pixel_shares(y0, y1, height)
        share = down[:, None] * across[None, :]
        total[rows, columns] += share * value
        cover[rows, columns] += share
    painted = np.divide(total, cover, out=np.zeros_like(total), where=cover > 0)
    return painted.astype(np.float32), cover


def _pixel_shares(start: float, stop: float, size: int) -> tuple[slice, np.ndarray[Any, Any]]:
    """Return the pixels that an interval touches, and the share of each that it covers."""
    first, last = max(int(np.floor(start)), 0), min(int(np.ceil(stop)), size)
    edges = np.arange(first, last + 1, dtype=np.float64)
    return slice(first, last), np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start)


def _widen(start: float, stop: float, margin: float, min_size: int, size: int) -> tuple[int, int]:
    """Grow an interval by a margin and to a least length, and return whole pixels inside of the picture."""
    low, high = max(start - margin, 0.0), min(stop + margin, float(size))
    length = min(max(high - low, min_size, 1.0), float(size))
    # what is lacking is added on both sides, as far as the picture reaches
    low = min(max((low + high - length) / 2, 0.0), size - length)
    high = low + length
    # float32 boxes may lie a hair beyond a whole pixel
    left, right = int(np.floor(low + 1e-3)), int(np.ceil(high - 1e-3))
    left = min(max(left, 0), size - 1)
    return left, min(max(right, left + 1), size)
