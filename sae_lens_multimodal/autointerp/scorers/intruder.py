"""Intruder: among regions of one feature, which one is another's? It tests the feature rather than its explanation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeFailure, Outcome
from sae_lens_multimodal.autointerp.measurer import Counted, Measured, Measurer, Plan, averages, by_band
from sae_lens_multimodal.autointerp.regions import find_regions, show, silent_region

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.selection import HeldOut
    from sae_lens_multimodal.features.example import Example


class IntruderScorer(Measurer):
    """Shows a few regions where the feature fires and one of a picture where it is silent, and asks for the odd one.

    After the intruder test of topic models (Chang et al. 2009), as Delphi uses it for features. `accuracy` is above
    `chance`, one out of all shown, where a feature has a meaning that the judge sees; no explanation is needed.

    Args:
        judge: who judges.
        book: its phrases; one that cannot ask for an intruder gives no numbers.
        n_trials: how often, each time with another intruder.
        n_shown: regions shown at a time, the intruder included.
    """

    name: ClassVar[str] = "intruder"
    judge: Judge
    needs_words: ClassVar[bool] = False

    def __init__(self, judge: Judge, book: PromptBook, *, n_trials: int = 4, n_shown: int = 4) -> None:
        self.judge, self.book, self.n_trials, self.n_shown = judge, book, n_trials, n_shown

    def settings(self) -> dict[str, Any]:
        """Give judge, phrases and numbers."""
        return {
            "judge": self.judge.cache_name,
            "prompts": self.book.version,
            "n_trials": self.n_trials,
            "n_shown": self.n_shown,
        }

    def plan(self, text: str, examples: HeldOut, rng: np.random.Generator) -> Plan | Measured:
        """Ask for the intruder in each trial; it stands anywhere."""
        del text
        style = self.book.fuzz_style.without_heat
        firing = [(one, found[0]) for one in examples.firing if (found := find_regions(one))]
        requests, truths, others = [], [], []
        for example in [one for one in examples.silent if one.images][: self.n_trials]:
            if len(firing) < self.n_shown - 1:
                break
            chosen = [firing[index] for index in rng.permutation(len(firing))[: self.n_shown - 1]]
            odd = silent_region(example, chosen[0][1], rng, margin_pixels=style.margin_pixels)
            if odd is None:
                continue
            views = [show(one.images[region.image], region, style)[0] for one, region in chosen]
            place = int(rng.integers(self.n_shown))
            views.insert(place, show(example.images[odd.image], odd, style)[0])
            requests.append(self.book.intruder(views))
            truths.append(place)
            others.append(chosen[0][0])
        asked = [request for request in requests if request is not None]
        if not asked:
            too_few = not requests
            return Measured(
                note="too few held-out examples" if too_few else "the prompt book cannot ask for an intruder"
            )
        return Plan(requests=asked, finish=lambda outcomes, counted: self._found(outcomes, truths, others, counted))

    def _found(
        self, outcomes: Sequence[Outcome], truths: Sequence[int], others: Sequence[Example], counted: Counted
    ) -> Measured:
        answers = [
            None if isinstance(one, JudgeFailure) else self.book.read_intruder(one.text, self.n_shown)
            for one in outcomes
        ]
        rows = [
            {"accuracy_strict": float(counted == "right")}
            if answer is None
            else {"accuracy_strict": float(answer == truth), "accuracy": float(answer == truth)}
            for answer, truth in zip(answers, truths, strict=True)
        ]
        return Measured(
            values={**averages(rows), "chance": 1 / self.n_shown},
            by_band=by_band(others, rows),
            n=len(rows),
            n_failed=sum(answer is None for answer in answers),
        )
