"""From activations to a layer of colour that can be laid over a picture, and taken off again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sae_lens_multimodal.autointerp.drawing import colours

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

RAMP_STEPS = 10
ALPHA = (120, 225)
"""Opacity of the colour where the feature is just active, and where it is fully lit, of 255."""
VEIL = (4, 16, 38, 120)
"""What lies over the silent part of a picture, so that the active part stands out."""


def ramp() -> tuple[tuple[int, int, int], ...]:
    """Give the colours of the heat map from silent to fully lit, at even steps; between them they change evenly."""
    steps = colours(np.linspace(0, 1, RAMP_STEPS)[None])[0].tolist()
    return tuple((red, green, blue) for red, green, blue in steps)


def heat_rgba(levels: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 4"]:
    """Colour a heat map so that it can be laid over a picture.

    Args:
        levels: share of the activation that counts as fully lit, 0 (silent) to 1; values outside are clipped.

    Returns:
        RGBA; silent places get a dark veil, active ones a colour, more opaque the stronger they are.
    """
    clipped = np.clip(np.nan_to_num(levels), 0.0, 1.0)
    out = np.empty((*clipped.shape, 4), dtype=np.uint8)
    out[..., :3] = colours(clipped)
    out[..., 3] = np.rint(ALPHA[0] + (ALPHA[1] - ALPHA[0]) * clipped)
    out[clipped <= 0] = VEIL
    return out
