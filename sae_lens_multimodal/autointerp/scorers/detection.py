"""Detection: which of these pictures or texts has what the explanation says?"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sae_lens_multimodal.autointerp.repeats import ReadTexts
from sae_lens_multimodal.autointerp.scorers.base import Item, Sampling, Scorer, shuffled
from sae_lens_multimodal.autointerp.texts import marked_text, plain_text

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.judges.base import JudgeRequest
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.selection import HeldOut
    from sae_lens_multimodal.features.example import Example


class DetectionScorer(Scorer):
    """Whole pictures, or stretches of text, in which the feature fires, against others in which it is silent."""

    name: ClassVar[str] = "detection"

    def items(self, examples: HeldOut, book: PromptBook, sampling: Sampling, rng: np.random.Generator) -> list[Item]:
        """Take the first held-out examples of each kind, each shown without marks, and each text once."""
        found: list[Item] = []
        read = ReadTexts(examples.read)
        for truth, pool, count in (
            (True, examples.firing, sampling.n_positive),
            (False, examples.silent, sampling.n_negative),
        ):
            made = (self._item(example, examples.modality, book, sampling, rng, truth=truth) for example in pool)
            fresh = (item for item in made if item is not None and (item.text is None or read.take(item.text)))
            found += islice(fresh, count)
        return shuffled(found, rng)

    def _item(
        self,
        example: Example,
        modality: str,
        book: PromptBook,
        sampling: Sampling,
        rng: np.random.Generator,
        *,
        truth: bool,
    ) -> Item | None:
        image, text = None, None
        if modality == "image":
            image = example.best_image if truth else int(rng.integers(len(example.images))) if example.images else None
        else:
            window = (
                marked_text(example, context=sampling.context, threshold=sampling.threshold)
                if truth
                else plain_text(example, rng, context=sampling.context)
            )
            text = None if window is None else book.mark(window.tokens, window.unmarked.marked)
        if image is None and not text:
            return None
        return Item(
            truth=truth,
            prompt_id=example.prompt_id,
            kind=example.kind,
            quantile=example.quantile,
            image_ids=tuple(example.image_ids),
            image=image,
            text=text,
            views=() if image is None else (example.images[image],),
        )

    def request(self, book: PromptBook, explanation: str, item: Item) -> JudgeRequest | None:
        """Ask whether the picture or text has what the explanation says."""
        if item.views:
            return book.detect_image(explanation, item.views[0])
        return book.detect_text(explanation, item.text or "")
