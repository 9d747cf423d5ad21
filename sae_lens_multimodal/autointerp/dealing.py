"""What the contrastive explainer sees and what its candidates are tried on: firing regions or marks, hard negatives."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from sae_lens_multimodal.autointerp.explanation import Shown
from sae_lens_multimodal.autointerp.negatives import HardNegatives, Place
from sae_lens_multimodal.autointerp.procedures import Context
from sae_lens_multimodal.autointerp.regions import crop, find_regions, heat_of, show
from sae_lens_multimodal.autointerp.repeats import ReadTexts, check_unread
from sae_lens_multimodal.autointerp.scorers import Item
from sae_lens_multimodal.autointerp.selection import Split
from sae_lens_multimodal.autointerp.texts import marked_text, plain_text, wrongly_marked

if TYPE_CHECKING:
    from sae_lens_multimodal.features.example import Example


class Views(NamedTuple):
    """What the explainer may be shown of one example."""

    views: list[Image.Image]
    text: str
    shown: Shown


class Dealer:
    """Makes what the explainer sees and what candidates are tried on."""

    def __init__(
        self, context: Context, feature: int, negatives: HardNegatives, count: int, rng: np.random.Generator
    ) -> None:
        self.context, self.feature, self.negatives, self.count, self.rng = context, feature, negatives, count, rng

    def shown(self, split: Split) -> tuple[list[Views], list[Views]]:
        """Show each firing example's strongest region, and hard negatives of the same prompts."""
        style = self.context.book.explain_style
        active = []
        for example in split.explain:
            region = next(iter(find_regions(example, threshold=self.context.threshold)), None)
            if region is None:
                continue
            heat = heat_of(example, region.image) if style.view == "heat" else None
            views = show(example.images[region.image], region, style, heat=heat)
            shown = Shown(prompt_id=example.prompt_id, active=True, image=region.image, box=region.box)
            active.append(Views(views, "", shown))
        found = self.negatives.find(
            self.feature, split.explain, split.explain_silent, self.context.n_contrast, style=style, rng=self.rng
        )
        quiet = []
        for example, region, _ in found:
            view = crop(example.images[region.image], region, style)
            shown = Shown(prompt_id=example.prompt_id, active=False, image=region.image, box=region.box)
            quiet.append(Views([view], "", shown))
        return active, quiet

    def items(self, split: Split) -> list[Item]:
        """Make firing regions and as many hard negatives."""
        book, validate = self.context.book, split.validate
        pairs = [
            (one, seen[0]) for one in validate.firing if (seen := find_regions(one, threshold=self.context.threshold))
        ]
        right = [self._item(Place(example, region, "firing"), truth=True) for example, region in pairs[: self.count]]
        found = self.negatives.find(
            self.feature, validate.firing, validate.silent, self.count, style=book.fuzz_style, rng=self.rng
        )
        wrong = [self._item(place, truth=False) for place in found]
        return _alternated(right, wrong)

    def _item(self, place: Place, *, truth: bool) -> Item:
        example, region, _ = place
        # a heat map would give the answer away
        style = self.context.book.fuzz_style
        style = replace(style, view="crop") if style.view == "heat" else style
        return Item(
            truth=truth,
            prompt_id=example.prompt_id,
            kind=example.kind,
            image_ids=tuple(example.image_ids),
            image=region.image,
            box=region.box,
            style=style.for_patches(region.patch_pixels),
            views=tuple(show(example.images[region.image], region, style)),
        )

    def text_of(self, example: Example) -> str | None:
        """Write the strongest stretch of an example's text with its marks; None where it fires on no text."""
        text = marked_text(example, context=self.context.context, threshold=self.context.threshold)
        return None if text is None else self.context.book.mark(text.tokens, text.marked)

    def shown_texts(self, split: Split) -> tuple[list[Views], list[Views]]:
        """Show each firing example's strongest stretch with its marks, and silent stretches."""
        active, quiet = [], []
        for example in split.explain:
            written = self.text_of(example)
            if written is not None:
                active.append(Views([], written, Shown(prompt_id=example.prompt_id, active=True, text=written)))
        for example in split.explain_silent:
            text = plain_text(example, self.rng, context=self.context.context)
            if text is not None:
                written = self.context.book.mark(text.tokens, text.marked)
                quiet.append(Views([], written, Shown(prompt_id=example.prompt_id, active=False, text=written)))
        return active, quiet

    def text_items(self, split: Split, shown: Collection[Views]) -> list[Item]:
        """Make right marks, and wrong ones: of the same texts and of silent texts in turn.

        Args:
            split: the feature's examples.
            shown: what the explainer sees; no item says the same, nor what another one says.
        """
        book, context = self.context.book, self.context
        read = ReadTexts(one.text for one in shown)
        right, same, other = [], [], []
        for example in split.validate.firing:
            text = marked_text(example, context=context.context, threshold=context.threshold)
            wrong = None if text is None else wrongly_marked(text, self.rng, markable=book.markable)
            written = [book.mark(one.tokens, one.marked) for one in (text, wrong) if one is not None]
            if written and read.take(*written):
                right.append(self._text_item(example, written[0], truth=True))
                same += [self._text_item(example, one, truth=False) for one in written[1:]]
        for example in split.validate.silent:
            plain = plain_text(example, self.rng, context=context.context)
            one_mark = None if plain is None else replace(plain, marked=(True, *plain.marked[1:]))
            wrong = None if one_mark is None else wrongly_marked(one_mark, self.rng, markable=book.markable)
            if wrong is not None and read.take(written_wrong := book.mark(wrong.tokens, wrong.marked)):
                other.append(self._text_item(example, written_wrong, truth=False))
        n_same = max(len(right) - len(other), (len(right) + 1) // 2)
        items = _alternated(right, [*same[:n_same], *other][: len(right)])
        texts = [(item.prompt_id, item.text or "") for item in items]
        check_unread(self.feature, texts, read=[one.text for one in shown])
        return items

    def _text_item(self, example: Example, text: str, *, truth: bool) -> Item:
        ids = tuple(example.image_ids)
        return Item(truth=truth, prompt_id=example.prompt_id, kind=example.kind, image_ids=ids, text=text)


def _alternated(right: Sequence[Item], wrong: Sequence[Item]) -> list[Item]:
    """Put two kinds of items in pairs that take turns, so that every other item is of both kinds; none without that."""
    if min(len(right), len(wrong)) < 2:
        return []
    pairs = [
        list(kind[start : start + 2]) for start in range(0, max(len(right), len(wrong)), 2) for kind in (right, wrong)
    ]
    return [item for pair in pairs for item in pair]
