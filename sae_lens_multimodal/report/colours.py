"""From activations to a layer of colour that can be laid over a picture, and taken off again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sae_lens_multimodal.autointerp.drawing import colours

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

_ALPHA_LOW, _ALPHA_HIGH = 120, 225
_VEIL = (4, 16, 38, 120)
"""What lies over the silent part of a picture, so that the active part stands out."""


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
    out[..., 3] = np.rint(_ALPHA_LOW + (_ALPHA_HIGH - _ALPHA_LOW) * clipped)
    out[clipped <= 0] = _VEIL
    return out
