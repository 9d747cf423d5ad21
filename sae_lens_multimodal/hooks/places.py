"""Tokens by the picture they belong to: one image of the prompt, or a box of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.errors import SelectionError
from sae_lens_multimodal.types import Box

View: TypeAlias = Literal["all", "base", "tiles"]
"""Which tokens of a picture: all, those of the view of the whole picture, those of its tiles."""

Corners: TypeAlias = "Box | tuple[float, float, float, float]"
"""`x0, y0, x1, y1` in pixels of the original picture."""

_VIEWS = ("all", "base", "tiles")


@dataclass(frozen=True)
class ImageTokens:
    """The patches of one picture of each prompt; prompts that have fewer pictures are left alone."""

    index: int = 0
    """Which picture of the prompt, from 0."""
    view: View = "all"
    """All of its tokens, or one view's."""

    def check(self) -> None:
        """Check what can be checked without a prompt.

        Raises:
            SelectionError: the index or the view can be no picture's.
        """
        _check_picture(self.index, self.view)

    def mask(self, layout: TokenLayout) -> Bool[Tensor, "batch seq"]:
        """Return the positions meant.

        Raises:
            SelectionError: no prompt has such a picture.
        """
        _check_some_row_has(layout, self.index)
        chosen = layout.is_image & (layout.image_index == self.index)
        return _of_view(chosen, layout, self.view)


@dataclass(frozen=True)
class BoxTokens:
    """The patches that lie in a box of one picture, given in pixels of the original picture."""

    box: Corners | Sequence[Corners | None]
    """`(x0, y0, x1, y1)`, the same for every prompt; or a list with one for each prompt, None where none is meant."""
    image: int = 0
    """Which picture of the prompt, from 0."""
    min_overlap: float = 0.5
    """Share of a patch's own area that has to lie in the box."""
    view: View = "all"
    """All of the picture's tokens, or one view's."""

    def check(self) -> None:
        """Check what can be checked without a prompt.

        Raises:
            SelectionError: a box is none, or picture, overlap or view cannot be.
        """
        _check_picture(self.image, self.view)
        if not 0 < self.min_overlap <= 1:
            raise SelectionError(f"Got min_overlap={self.min_overlap!r}; expected more than 0 and at most 1.")
        boxes = self._boxes()
        if not any(box is not None for box in boxes):
            raise SelectionError("Got no box; expected (x0, y0, x1, y1) in pixels, or one for each prompt.")
        for box in boxes:
            if box is not None and not (
                all(math.isfinite(value) for value in box) and box[2] > box[0] and box[3] > box[1]
            ):
                raise SelectionError(f"Got the box {tuple(box)}; expected finite x0 < x1 and y0 < y1, in pixels.")

    def mask(self, layout: TokenLayout, n_prompts: int | None = None) -> Bool[Tensor, "batch seq"]:
        """Return the positions meant.

        Args:
            layout: of the rows.
            n_prompts: how many prompts they are of, where beams or samples share one; None for as many as rows.

        Raises:
            SelectionError: a box lies outside of its picture, no prompt has such a picture, no patch lies in any box,
                or the number of boxes is not that of the prompts.
        """
        _check_some_row_has(layout, self.image)
        boxes = self._boxes()
        prompts = n_prompts or layout.n_rows
        if len(boxes) not in (1, prompts):
            raise SelectionError(f"Got {len(boxes)} boxes for {prompts} prompts; expected one box, or one for each.")
        mask = torch.zeros(layout.modality.shape, dtype=torch.bool)
        copies = layout.n_rows // len(boxes)
        for row, sizes in enumerate(layout.image_sizes):
            box = boxes[row // copies]
            if box is None or self.image >= len(sizes):
                continue
            _check_inside(box, sizes[self.image], row=row, image=self.image)
            found = layout.tokens_in(box, row=row, image=self.image, min_overlap=self.min_overlap, view=self.view)
            mask[row, found] = True
        if not bool(mask.any()):
            raise SelectionError(
                f"No patch has {self.min_overlap:.0%} of its area in the box {self.box}; enlarge the box or lower "
                "min_overlap."
            )
        return mask

    def _boxes(self) -> list[Corners | None]:
        one = len(self.box) == 4 and all(isinstance(value, int | float) for value in self.box)
        if one:
            return [cast("Corners", self.box)]
        boxes = list(cast("Sequence[Corners | None]", self.box))
        for box in boxes:
            if box is not None and (isinstance(box, int | float) or len(box) != 4):
                raise SelectionError(f"Got {self.box!r} as a box; expected (x0, y0, x1, y1), or one for each prompt.")
        return boxes


def _check_picture(index: int, view: str) -> None:
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise SelectionError(f"Got image {index!r}; expected the place of a picture in the prompt, from 0.")
    if view not in _VIEWS:
        raise SelectionError(f"Got view={view!r}; expected one of {', '.join(_VIEWS)}.")


def _check_some_row_has(layout: TokenLayout, index: int) -> None:
    most = max((len(sizes) for sizes in layout.image_sizes), default=0)
    if index >= most:
        raise SelectionError(f"Got image {index}; the prompts have at most {most} pictures, counted from 0.")


def _check_inside(box: Corners, size: tuple[int, int], *, row: int, image: int) -> None:
    x0, y0, x1, y1 = box
    if x0 < 0 or y0 < 0 or x1 > size[0] or y1 > size[1]:
        raise SelectionError(
            f"Got the box {tuple(box)}, which lies outside of image {image} of row {row}; expected a box within "
            f"its {size[0]} x {size[1]} pixels."
        )


def _of_view(chosen: Tensor, layout: TokenLayout, view: View) -> Tensor:
    if view == "all":
        return chosen
    return chosen & ((layout.tile == 0) if view == "base" else (layout.tile > 0))
