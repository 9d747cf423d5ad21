"""Where in a picture a feature is active, patch by patch: small numbers that a page draws from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sae_lens_multimodal.report.view import PatchesView, PatchView

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float

    from sae_lens_multimodal.features.example import Example

FULL = 1000
"""A whole side of the picture, and a patch that is fully lit."""
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def patches_view(example: Example, image: int, scale: float) -> PatchesView:
    """List the patches of a picture on which a feature is active, of the view of the whole picture and of its tiles.

    Tokens whose place in the picture is not known are one patch, all of the picture, with their mean.

    Args:
        example: one feature on one prompt.
        image: which picture of the prompt.
        scale: activation that counts as fully lit.
    """
    layout, values = example.layout, example.image_values
    mine = (np.asarray(layout.image_index[0]) == image) & np.asarray(layout.is_image[0])
    tile = np.asarray(layout.tile[0])
    width, height = layout.image_sizes[0][image]
    sides = np.array([width, height, width, height], dtype=np.float64)
    boxes = np.asarray(layout.boxes[0], dtype=np.float64) / sides
    levels = values.astype(np.float64) / scale
    return PatchesView(
        base=_patches(boxes[mine & (tile <= 0)], levels[mine & (tile <= 0)]),
        tiles=_patches(boxes[mine & (tile > 0)], levels[mine & (tile > 0)]),
    )


def _patches(boxes: Float[np.ndarray, "n 4"], levels: Float[np.ndarray, "n"]) -> tuple[PatchView, ...]:
    placed = np.isfinite(boxes).all(axis=1)
    found = np.column_stack([np.clip(boxes[placed], 0, 1), np.minimum(levels[placed], 1.0)])
    if not placed.all():
        mean = float(np.minimum(levels[~placed].mean(), 1.0))
        found = np.vstack([found, [0.0, 0.0, 1.0, 1.0, mean]])
    whole = np.rint(FULL * found[found[:, 4] > 0]).astype(int)
    whole[:, 4] = np.maximum(whole[:, 4], 1)
    has_area = (whole[:, 2] > whole[:, 0]) & (whole[:, 3] > whole[:, 1])
    ordered = whole[has_area][np.argsort(whole[has_area][:, 4], kind="stable")]
    return tuple(PatchView(*row) for row in ordered.tolist())


def packed(patches: Iterable[PatchView]) -> str:
    """Spell patches as text: each number as two digits of base 36, without anything between them.

    Example:
        >>> packed([PatchView(0, 35, 1000, 36, 500)])
        '000zrs10dw'
    """
    return "".join(_DIGITS[value // 36] + _DIGITS[value % 36] for patch in patches for value in patch)
