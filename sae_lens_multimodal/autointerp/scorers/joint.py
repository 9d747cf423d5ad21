"""Fuzzing in both modalities at once: are the marked region and the marked words what the explanation speaks of?"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sae_lens_multimodal.autointerp.joint import joint_examples
from sae_lens_multimodal.autointerp.places import exchanged
from sae_lens_multimodal.autointerp.repeats import ReadTexts
from sae_lens_multimodal.autointerp.scorers.base import Item, Sampling, shuffled
from sae_lens_multimodal.autointerp.scorers.fuzzing import FuzzingScorer
from sae_lens_multimodal.autointerp.texts import wrongly_marked

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.judges.base import JudgeRequest
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.selection import HeldOut


class JointFuzzingScorer(FuzzingScorer):
    """Region and words of one prompt on which the feature fires, against a silent region and silent words of it.

    The regions are chosen as `fuzzing` chooses them, at one another's places. Only prompts count in which the feature
    fires in both modalities, see `autointerp.joint`.
    """

    name: ClassVar[str] = "fuzzing_joint"
    both_lists: ClassVar[bool] = True

    def items(self, examples: HeldOut, book: PromptBook, sampling: Sampling, rng: np.random.Generator) -> list[Item]:
        """Make pairs of a right and a wrong item, each with a region and marked words."""
        read = ReadTexts(examples.read)
        texts, spots = {}, []
        for one in joint_examples(examples.firing, threshold=sampling.threshold, context=sampling.context):
            wrong = wrongly_marked(one.text, rng, markable=book.markable)
            if wrong is None:
                continue
            written = [book.mark(text.tokens, text.marked) for text in (one.text, wrong)]
            if read.take(*written):
                texts[one.example.prompt_id] = written
                spots.append(one.spot)
        spots = [spots[index] for index in rng.permutation(len(spots))]
        n_pairs = min(sampling.n_positive, sampling.n_negative)
        found = []
        for spot, silent in exchanged(spots, n_pairs, margin_pixels=book.fuzz_style.margin_pixels):
            right, wrong_text = texts[spot.example.prompt_id]
            found.append(self._region_item(spot.example, spot.region, spot.region, book, text=right))
            found.append(self._region_item(spot.example, spot.region, silent, book, text=wrong_text))
        return shuffled(found, rng)

    def request(self, book: PromptBook, explanation: str, item: Item) -> JudgeRequest | None:
        """Ask whether both are what the explanation says."""
        return book.fuzz_joint(explanation, item.views, item.text or "")
