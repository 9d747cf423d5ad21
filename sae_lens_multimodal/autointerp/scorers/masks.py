"""Masks: does a feature fire where the thing is that its explanation names? IoU and the pointing game."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from sae_lens_multimodal.autointerp.measures import Measured, Measurer, averages, by_band
from sae_lens_multimodal.autointerp.regions import heat_of
from sae_lens_multimodal.errors import SelectionError

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.selection import HeldOut
    from sae_lens_multimodal.features.example import Example

MaskOf: TypeAlias = "Callable[[str, Example, int], Bool[np.ndarray, 'h w'] | None]"
"""From an explanation, an example and the index of its picture to the pixels of what the explanation names; None where
that is not known. It may look masks up, or ask a segmenter."""


class MaskScorer(Measurer):
    """Compares where a feature fires with given masks of what its explanation names.

    `iou` is the intersection over union of the mask and the pixels that fire at least `threshold` as strongly as the
    strongest; `pointing` says whether the strongest pixel lies in the mask (Zhang et al. 2016). Beside them
    `iou_floor` and `pointing_floor`: the same for the activation map moved by chance around the picture, which keeps
    its size and shape. A picture whose mask is not known is left out, and counts as 0 in the strict numbers.

    Args:
        mask_of: gives the masks.
        name: of where they come from, recorded with the results.
        n_items: pictures at most.
        threshold: share of the picture's strongest activation from which on a pixel counts.
    """

    name: ClassVar[str] = "masks"

    def __init__(self, mask_of: MaskOf, *, source: str, n_items: int = 8, threshold: float = 0.5) -> None:
        self.mask_of, self.source, self.n_items, self.threshold = mask_of, source, n_items, threshold

    def settings(self) -> dict[str, Any]:
        """Give source and numbers."""
        return {"source": self.source, "n_items": self.n_items, "threshold": self.threshold}

    def measure(self, text: str, examples: HeldOut, rng: np.random.Generator) -> Measured:
        """Compare each firing picture with its mask."""
        chosen = [one for one in examples.firing if one.best_image is not None][: self.n_items]
        rows = [self._row(text, example, rng) for example in chosen]
        if not rows:
            return Measured(note="too few held-out examples")
        known = [row for row in rows if "iou" in row]
        if not known:
            return Measured(note="no mask is known for this explanation", n=len(rows), n_failed=len(rows))
        return Measured(
            values=averages(rows), by_band=by_band(chosen, rows), n=len(rows), n_failed=len(rows) - len(known)
        )

    def _row(self, text: str, example: Example, rng: np.random.Generator) -> dict[str, float]:
        image = example.best_image or 0
        heat = heat_of(example, image)
        shift = (int(rng.integers(heat.shape[0])), int(rng.integers(heat.shape[1])))
        mask = self.mask_of(text, example, image)
        if mask is None:
            return {"iou_strict": 0.0, "pointing_strict": 0.0}
        if mask.shape != heat.shape:
            raise SelectionError(
                f"the mask of {text!r} is {mask.shape}, the picture {heat.shape}, both (height, width); give masks of "
                "the original picture."
            )
        iou, pointing = overlap(heat, mask, self.threshold), points_into(heat, mask)
        moved = np.roll(heat, shift, axis=(0, 1))
        return {
            "iou": iou,
            "iou_strict": iou,
            "pointing": pointing,
            "pointing_strict": pointing,
            "iou_floor": overlap(moved, mask, self.threshold),
            "pointing_floor": points_into(moved, mask),
        }


def overlap(heat: Float[np.ndarray, "h w"], mask: Bool[np.ndarray, "h w"], threshold: float) -> float:
    """Intersection over union of a mask and the pixels that count; 0 where neither has any.

    Example:
        >>> overlap(np.array([[4.0, 2.0, 1.0]]), np.array([[False, True, True]]), 0.5)
        0.3333333333333333
    """
    peak = float(heat.max(initial=0.0))
    fires = (heat >= threshold * peak) & (heat > 0)
    union = int((fires | mask).sum())
    return int((fires & mask).sum()) / union if union else 0.0


def points_into(heat: Float[np.ndarray, "h w"], mask: Bool[np.ndarray, "h w"]) -> float:
    """Share of the strongest pixels that lie in the mask: a patch has many pixels of the same strength.

    Example:
        >>> points_into(np.array([[4.0, 4.0, 1.0]]), np.array([[False, True, True]]))
        0.5
    """
    peak = float(heat.max(initial=0.0))
    return float(mask[heat >= peak].mean()) if peak > 0 else 0.0
