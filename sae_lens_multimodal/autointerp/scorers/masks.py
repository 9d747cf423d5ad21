"""Masks: does a feature fire where the thing is that its explanation names? IoU and the pointing game."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from sae_lens_multimodal.autointerp.measurer import SKIPPED, Counted, Measured, Measurer, Plan, averages, by_band
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
    its size and shape. A picture whose mask is not known is left out; in the strict numbers it counts as missed.

    Args:
        mask_of: gives the masks: given ones (a function, or `autointerp.mask_files.FolderMasks`), or those of a
            text-to-mask model (`autointerp.segmenters`). None: it gives no numbers, and says so.
        source: where the masks come from, recorded with the results.
        n_items: pictures at most.
        threshold: share of the picture's strongest activation from which on a pixel counts.
    """

    name: ClassVar[str] = "masks"

    def __init__(self, mask_of: MaskOf | None, *, source: str, n_items: int = 8, threshold: float = 0.5) -> None:
        self.mask_of, self.source, self.n_items, self.threshold = mask_of, source, n_items, threshold

    def settings(self) -> dict[str, Any]:
        """Give source and numbers."""
        return {"source": self.source, "n_items": self.n_items, "threshold": self.threshold}

    def plan(self, text: str, examples: HeldOut, rng: np.random.Generator) -> Plan | Measured:
        """Compare each firing picture with its mask."""
        if self.mask_of is None:
            return Measured(note=f"{SKIPPED}no masks and no segmenter were given")
        chosen = [one for one in examples.firing if one.best_image is not None][: self.n_items]
        if not chosen:
            return Measured(note="too few held-out examples")
        rows = [self._row(self.mask_of, text, example, rng) for example in chosen]
        return Plan(finish=lambda _, counted: self._found(chosen, rows, counted))

    def _found(self, chosen: Sequence[Example], rows: Sequence[dict[str, float] | None], counted: Counted) -> Measured:
        n_failed = sum(row is None for row in rows)
        if n_failed == len(rows):
            return Measured(note="no mask is known for this explanation", n=len(rows), n_failed=n_failed)
        unknown = float(counted == "right")
        strict = [
            {"iou_strict": unknown, "pointing_strict": unknown}
            if row is None
            else {**row, "iou_strict": row["iou"], "pointing_strict": row["pointing"]}
            for row in rows
        ]
        return Measured(values=averages(strict), by_band=by_band(chosen, strict), n=len(rows), n_failed=n_failed)

    def _row(self, mask_of: MaskOf, text: str, example: Example, rng: np.random.Generator) -> dict[str, float] | None:
        image = example.best_image or 0
        heat = heat_of(example, image)
        shift = (int(rng.integers(heat.shape[0])), int(rng.integers(heat.shape[1])))
        mask = mask_of(text, example, image)
        if mask is None:
            return None
        if mask.shape != heat.shape:
            raise SelectionError(
                f"the mask of {text!r} is {mask.shape}, the picture {heat.shape}, both (height, width); give masks of "
                "the original picture."
            )
        moved = np.roll(heat, shift, axis=(0, 1))
        return {
            "iou": overlap(heat, mask, self.threshold),
            "pointing": points_into(heat, mask),
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
