"""Fuzzing: is the marked region, or are the marked words, the ones that the explanation speaks of?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sae_lens_multimodal.autointerp.regions import Region, find_regions, heat_of, moved_heat, show, silent_region
from sae_lens_multimodal.autointerp.scorers.base import Item, Sampling, Scorer, shuffled
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.autointerp.texts import MarkedText, marked_text, wrongly_marked

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.judges.base import JudgeRequest
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.selection import HeldOut
    from sae_lens_multimodal.features.example import Example


class FuzzingScorer(Scorer):
    """The region or words on which the feature fires, against as large ones of the same picture or text.

    An example gives both, or none where it has no silent place of that size: so both come in equal numbers, from the
    same pictures.
    """

    name: ClassVar[str] = "fuzzing"

    def items(self, examples: HeldOut, book: PromptBook, sampling: Sampling, rng: np.random.Generator) -> list[Item]:
        """Make pairs of a right and a wrong item from as many examples as are wanted."""
        make = self._of_picture if examples.modality == "image" else self._of_text
        found: list[Item] = []
        n_pairs = min(sampling.n_positive, sampling.n_negative)
        for example in examples.firing:
            if len(found) >= 2 * n_pairs:
                break
            found += make(example, book, sampling, rng)
        return shuffled(found, rng)

    def _of_picture(
        self, example: Example, book: PromptBook, sampling: Sampling, rng: np.random.Generator
    ) -> Iterator[Item]:
        style = book.fuzz_style
        for region in find_regions(example, threshold=sampling.threshold)[:1]:
            wrong = silent_region(example, region, rng, margin_pixels=style.margin_pixels)
            if wrong is not None:
                yield self._region_item(example, region, region, book)
                yield self._region_item(example, region, wrong, book)

    def _region_item(
        self, example: Example, right: Region, region: Region, book: PromptBook, style: RegionStyle | None = None
    ) -> Item:
        style = style or book.fuzz_style
        heat = moved_heat(heat_of(example, region.image), right.box, region.box) if style.view == "heat" else None
        return Item(
            truth=region is right,
            prompt_id=example.prompt_id,
            kind=example.kind,
            quantile=example.quantile,
            image_ids=tuple(example.image_ids),
            image=region.image,
            box=region.box,
            style=style.for_patches(region.patch_pixels),
            views=tuple(show(example.images[region.image], region, style, heat=heat)),
        )

    def _of_text(
        self, example: Example, book: PromptBook, sampling: Sampling, rng: np.random.Generator
    ) -> Iterator[Item]:
        right = marked_text(example, context=sampling.context, threshold=sampling.threshold)
        wrong = None if right is None else wrongly_marked(right, rng, markable=book.markable)
        if right is not None and wrong is not None:
            yield self._text_item(example, right, book, truth=True)
            yield self._text_item(example, wrong, book, truth=False)

    def _text_item(self, example: Example, text: MarkedText, book: PromptBook, *, truth: bool) -> Item:
        return Item(
            truth=truth,
            prompt_id=example.prompt_id,
            kind=example.kind,
            quantile=example.quantile,
            image_ids=tuple(example.image_ids),
            text=book.mark(text.tokens, text.marked),
        )

    def request(self, book: PromptBook, explanation: str, item: Item) -> JudgeRequest | None:
        """Ask whether the region, or the marked words, are what the explanation says."""
        if item.views:
            return book.fuzz_image(explanation, item.views)
        return book.fuzz_text(explanation, item.text or "")
