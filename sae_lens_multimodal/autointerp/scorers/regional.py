"""Detection on crops: is this cut-out one of a picture in which the feature fires, or of one in which it is silent?"""

from __future__ import annotations

from itertools import cycle, islice
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sae_lens_multimodal.autointerp.places import placed_alike, strongest_spots
from sae_lens_multimodal.autointerp.scorers.base import Item, Sampling, shuffled
from sae_lens_multimodal.autointerp.scorers.fuzzing import FuzzingScorer

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.selection import HeldOut


class CropDetectionScorer(FuzzingScorer):
    """Regions where the feature fires, against as large regions of other pictures, in which it is silent.

    Whole pictures often hold many things, so that a judge is asked about a crowd; here it sees one region at a time.
    The silent regions are as large as the others and lie at the same places. Of text there are no crops: use
    `detection`.
    """

    name: ClassVar[str] = "detection_crop"

    def items(self, examples: HeldOut, book: PromptBook, sampling: Sampling, rng: np.random.Generator) -> list[Item]:
        """Cut firing regions out, and regions of the same sizes and places out of silent pictures."""
        if examples.modality != "image":
            return []
        style = book.fuzz_style.without_heat
        firing = list(islice(strongest_spots(examples.firing, threshold=sampling.threshold), sampling.n_positive))
        right = [self._region_item(one, region, region, book, style) for one, region in firing]
        like = list(islice(cycle(firing), sampling.n_negative))
        silent = placed_alike(like, examples.silent, rng=rng, margin_pixels=style.margin_pixels)
        # the firing region is what the silent one is not
        wrong = [
            self._region_item(found.example, one.region, found.region, book, style)
            for one, found in zip(like, silent, strict=True)
            if found is not None
        ]
        return shuffled([*right, *wrong], rng)
