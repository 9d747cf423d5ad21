"""Fuzzing: is the marked region, or are the marked words, the ones that the explanation speaks of?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sae_lens_multimodal.autointerp.places import exchanged, strongest_spots
from sae_lens_multimodal.autointerp.regions import Region, heat_of, moved_heat, show
from sae_lens_multimodal.autointerp.repeats import ReadTexts
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
    same pictures. The silent regions lie where those of other pictures of the test lie (see `places.exchanged`), so
    that a judge who knows only where a region lies in its picture cannot tell right from wrong.
    """

    name: ClassVar[str] = "fuzzing"

    def items(self, examples: HeldOut, book: PromptBook, sampling: Sampling, rng: np.random.Generator) -> list[Item]:
        """Make pairs of a right and a wrong item from as many examples as are wanted."""
        make = self._of_pictures if examples.modality == "image" else self._of_texts
        n_pairs = min(sampling.n_positive, sampling.n_negative)
        pairs = make(examples, book, sampling, rng)
        return shuffled([item for pair in islice(pairs, n_pairs) for item in pair], rng)

    def _of_pictures(
        self, examples: HeldOut, book: PromptBook, sampling: Sampling, rng: np.random.Generator
    ) -> Iterator[tuple[Item, Item]]:
        del rng
        n_pairs = min(sampling.n_positive, sampling.n_negative)
        spots = strongest_spots(examples.firing, threshold=sampling.threshold)
        for (example, region), wrong in exchanged(spots, n_pairs, margin_pixels=book.fuzz_style.margin_pixels):
            yield (
                self._region_item(example, region, region, book),
                self._region_item(example, region, wrong, book),
            )

    def _region_item(
        self,
        example: Example,
        right: Region,
        region: Region,
        book: PromptBook,
        style: RegionStyle | None = None,
        text: str | None = None,
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
            text=text,
            views=tuple(show(example.images[region.image], region, style, heat=heat)),
        )

    def _of_texts(
        self, examples: HeldOut, book: PromptBook, sampling: Sampling, rng: np.random.Generator
    ) -> Iterator[tuple[Item, Item]]:
        read = ReadTexts(examples.read)
        for example in examples.firing:
            right = marked_text(example, context=sampling.context, threshold=sampling.threshold)
            wrong = None if right is None else wrongly_marked(right, rng, markable=book.markable)
            if right is None or wrong is None:
                continue
            pair = self._text_item(example, right, book, truth=True), self._text_item(example, wrong, book, truth=False)
            # a book may show another part of the text around other marks
            if read.take(*(item.text or "" for item in pair)):
                yield pair

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
