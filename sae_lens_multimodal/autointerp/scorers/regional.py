"""Detection on crops: is this cut-out one of a picture in which the feature fires, or of one in which it is silent?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sae_lens_multimodal.autointerp.regions import Region, find_regions, silent_region
from sae_lens_multimodal.autointerp.scorers.base import Item, Sampling, shuffled
from sae_lens_multimodal.autointerp.scorers.fuzzing import FuzzingScorer

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.selection import HeldOut
    from sae_lens_multimodal.features.example import Example


class CropDetectionScorer(FuzzingScorer):
    """Regions where the feature fires, against as large regions of other pictures, in which it is silent.

    Whole pictures often hold many things, so that a judge is asked about a crowd; here it sees one region at a time.
    Of text there are no crops: use `detection`.
    """

    name: ClassVar[str] = "detection_crop"

    def items(self, examples: HeldOut, book: PromptBook, sampling: Sampling, rng: np.random.Generator) -> list[Item]:
        """Cut firing regions out, and regions of the same sizes out of silent pictures."""
        if examples.modality != "image":
            return []
        firing = [
            (one, found[0]) for one in examples.firing if (found := find_regions(one, threshold=sampling.threshold))
        ]
        style, shown = book.fuzz_style.without_heat, firing[: sampling.n_positive]
        right = [self._region_item(one, region, region, book, style) for one, region in shown]
        wrong = list(self._silent(examples, [region for _, region in firing], book, rng))[: sampling.n_negative]
        return shuffled([*right, *wrong], rng)

    def _silent(
        self, examples: HeldOut, regions: list[Region], book: PromptBook, rng: np.random.Generator
    ) -> Iterator[Item]:
        quiet: list[Example] = [one for one in examples.silent if one.images]
        for number, example in enumerate(quiet if regions else []):
            like = replace(regions[number % len(regions)], image=int(rng.integers(len(example.images))))
            found = silent_region(example, like, rng, margin_pixels=book.fuzz_style.margin_pixels)
            if found is not None:
                # `like` stands for the right region: it is what this one is not
                yield self._region_item(example, like, found, book, book.fuzz_style.without_heat)
