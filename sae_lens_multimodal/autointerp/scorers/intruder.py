"""Intruder: among regions of one feature, which one is another's? It tests the feature rather than its explanation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from sae_lens_multimodal.autointerp.drawing import enlarged
from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeFailure, Outcome
from sae_lens_multimodal.autointerp.measurer import Counted, Measured, Measurer, Plan, averages, by_band
from sae_lens_multimodal.autointerp.places import placed_alike, strongest_spots
from sae_lens_multimodal.autointerp.regions import show
from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.selection import HeldOut
    from sae_lens_multimodal.features.example import Example


class _Trial(NamedTuple):
    views: list[Image.Image]
    place: int
    """Where the intruder stands, from 0."""
    example: Example
    """One of the others."""


class IntruderScorer(Measurer):
    """Shows a few regions where the feature fires and one of a picture where it is silent, and asks for the odd one.

    After the intruder test of topic models (Chang et al. 2009), as Delphi uses it for features. `accuracy` is above
    `chance`, one out of all shown, where a feature has a meaning that the judge sees; no explanation is needed. The
    intruder has the size and the place of one more region where the feature fires, which is not shown, and all are
    shown equally large, so that neither tells it from the others; it stands in each position equally often.

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
        if n_trials < 1 or n_shown < 2:
            raise ConfigError(f"n_trials={n_trials}, n_shown={n_shown}; expected at least 1 and 2.")
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
        """Ask for the intruder in each trial."""
        del text
        trials = self._trials(examples, rng)
        requests = [request for trial in trials if (request := self.book.intruder(trial.views)) is not None]
        if not requests:
            return Measured(
                note="the prompt book cannot ask for an intruder" if trials else "too few held-out examples"
            )
        return Plan(requests=requests, finish=lambda outcomes, counted: self._found(outcomes, trials, counted))

    def _found(self, outcomes: Sequence[Outcome], trials: Sequence[_Trial], counted: Counted) -> Measured:
        answers = [
            None if isinstance(one, JudgeFailure) else self.book.read_intruder(one.text, self.n_shown)
            for one in outcomes
        ]
        rows = [
            {"accuracy_strict": float(counted == "right")}
            if answer is None
            else {"accuracy_strict": float(answer == trial.place), "accuracy": float(answer == trial.place)}
            for answer, trial in zip(answers, trials, strict=True)
        ]
        return Measured(
            values={**averages(rows), "chance": 1 / self.n_shown},
            by_band=by_band([trial.example for trial in trials], rows),
            n=len(rows),
            n_failed=sum(answer is None for answer in answers),
        )

    def _trials(self, examples: HeldOut, rng: np.random.Generator) -> list[_Trial]:
        """Draw the regions of each trial, and put the intruder among them."""
        style = self.book.fuzz_style.without_heat
        firing = list(strongest_spots(examples.firing))
        if len(firing) < self.n_shown:
            return []
        drawn = [
            [firing[index] for index in rng.permutation(len(firing))[: self.n_shown]] for _ in range(self.n_trials)
        ]
        odd = placed_alike([one[-1] for one in drawn], examples.silent, rng=rng, margin_pixels=style.margin_pixels)
        found = [(spots[:-1], one) for spots, one in zip(drawn, odd, strict=True) if one is not None]
        places = balanced_places(len(found), self.n_shown, rng)
        trials = []
        for (spots, intruder), place in zip(found, places, strict=True):
            shown = [*spots[:place], intruder, *spots[place:]]
            views = [show(one.images[region.image], region, style)[0] for one, region in shown]
            longest = max(min(view.size) for view in views)
            views = [enlarged(view, longest) for view in views]
            trials.append(_Trial(views, place, spots[0].example))
        return trials


def balanced_places(count: int, n_places: int, rng: np.random.Generator) -> list[int]:
    """Draw places so that each comes as often as any other, or once more, in random order.

    Example:
        >>> sorted(balanced_places(6, 3, np.random.default_rng(0)))
        [0, 0, 1, 1, 2, 2]
    """
    rounds = -(-count // n_places)
    return [place for _ in range(rounds) for place in rng.permutation(n_places).tolist()][:count]
