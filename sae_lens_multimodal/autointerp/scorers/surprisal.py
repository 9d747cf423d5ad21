"""Surprisal: how many bits of the truth does an explanation give away? For judges that give log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from sae_lens_multimodal.autointerp.confidence import probability_of_yes
from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeFailure, JudgeReply, JudgeRequest, Outcome
from sae_lens_multimodal.autointerp.judges.log_probabilities import MOST_TOP
from sae_lens_multimodal.autointerp.measurer import SKIPPED, Counted, Measured, Measurer, Plan, by_named_band
from sae_lens_multimodal.autointerp.metrics import auroc
from sae_lens_multimodal.autointerp.quantiles import band_of
from sae_lens_multimodal.autointerp.scorers import SCORERS
from sae_lens_multimodal.autointerp.scorers.base import Item, Sampling
from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.selection import HeldOut

MOST_BITS = 10.0
"""No answer counts as more surprising than that (1 in 1024), so that one item does not decide the mean."""
NO_LOG_PROBABILITIES = f"{SKIPPED}the judge gives no log-probabilities"
_GREY = (127, 127, 127)


class SurprisalScorer(Measurer):
    """Asks as detection does, and looks at how likely the judge holds its answers rather than at the answers alone.

    `surprisal_bits` is the mean of -log2 of the probability that the judge gives the right answer, yes for items on
    which the feature fires and no for silent ones, both kinds counting alike: 1 is chance, 0 is certainty, and it is a
    proper score (Good 1952). `auroc` is the chance that a firing item is given a higher probability of yes than a
    silent one (as VQAScore ranks pictures, Lin et al. 2024); .5 is chance.

    A judge in this process also rates words that it did not choose, which gives the surprisal score of Paulo et al.
    2024 (arXiv 2410.13928; Delphi): by how many bits the explanation makes an example likelier than no explanation
    does. `gain_bits` is that of firing items, beside `gain_bits_silent`; `gain_auroc` how well the two are told apart.
    For text it is the log-probability of the text after the explanation, less that after words that fit any text. No
    model of this kind gives the probability of a picture; but log p(picture | words) - log p(picture) is
    log p(words | picture) - log p(words), so for regions it is the log-probability of the explanation as an answer to
    what the region shows, less that for a grey region of the same size.

    Items are crops of pictures (`detection_crop`) or stretches of text (`detection`). In the strict numbers an item
    without a usable answer counts as if the judge had been certain of the wrong one.

    Args:
        judge: who judges.
        book: its phrases; gains need one that has `caption` or `compose`.
        n_items: firing items, and as many silent ones.
        threshold: share of an example's strongest activation from which on a token belongs to a region.
        context: tokens of text shown on either side.
        n_top: how many of the likeliest tokens are asked for.
    """

    name: ClassVar[str] = "surprisal"
    judge: Judge
    modalities: ClassVar[tuple[Any, ...]] = ("image", "text")

    def __init__(
        self,
        judge: Judge,
        book: PromptBook,
        *,
        n_items: int = 8,
        threshold: float = 0.5,
        context: int = 12,
        n_top: int = MOST_TOP,
    ) -> None:
        if min(n_items, n_top) < 1:
            raise ConfigError(f"n_items={n_items}, n_top={n_top}; expected at least 1 of each.")
        self.judge, self.book = judge, book
        self.sampling = Sampling(n_positive=n_items, n_negative=n_items, threshold=threshold, context=context)
        self.n_top = n_top
        self._is_known_to_give = False
        self._gives = True

    def settings(self) -> dict[str, Any]:
        """Give judge, phrases and numbers."""
        return {
            "judge": self.judge.cache_name,
            "prompts": self.book.version,
            "n_items": self.sampling.n_positive,
            "threshold": self.sampling.threshold,
            "context": self.sampling.context,
            "n_top": self.n_top,
        }

    def plan(self, text: str, examples: HeldOut, rng: np.random.Generator) -> Plan | Measured:
        """Ask about each item whether it fits, and how likely it is with the explanation and without."""
        scorer = SCORERS["detection_crop" if examples.modality == "image" else "detection"]
        items = scorer.items(examples, self.book, self.sampling, rng)
        if len({item.truth for item in items}) < 2:
            return Measured(note="too few held-out examples")
        asked = [(item, scorer.request(self.book, text, item)) for item in items]
        judged = [
            (item, replace(request, top_log_probabilities=self.n_top)) for item, request in asked if request is not None
        ]
        if len({item.truth for item, _ in judged}) < 2:
            return Measured(note="the prompt book has no words for this explanation")
        if not self._judge_gives(judged[0][1]):
            return Measured(note=NO_LOG_PROBABILITIES)
        rated = [(item, pair) for item in items if (pair := self._pair(text, item)) is not None]
        return Plan(
            requests=[*(request for _, request in judged), *(request for _, pair in rated for request in pair)],
            finish=lambda outcomes, counted: self._found(
                [item for item, _ in judged], [item for item, _ in rated], outcomes, counted
            ),
        )

    def _judge_gives(self, request: JudgeRequest) -> bool:
        """Ask once whether there are log-probabilities at all: a server only shows it in an answer."""
        if not self._is_known_to_give and self._gives:
            outcome = self.judge.ask(request)
            self._gives = self.judge.gives_log_probabilities
            if isinstance(outcome, JudgeReply):
                self._gives = outcome.log_probabilities is not None
                self._is_known_to_give = self._gives
        return self._gives

    def _pair(self, text: str, item: Item) -> tuple[JudgeRequest, JudgeRequest] | None:
        """Rate the words with the explanation (for a picture: with the region), and without."""
        if not self.judge.rates_given_replies:
            return None
        if item.views:
            blank = [Image.new("RGB", view.size, _GREY) for view in item.views]
            pair = (self.book.caption(text, item.views), self.book.caption(text, blank))
        else:
            pair = (self.book.compose(text, item.text or ""), self.book.compose(None, item.text or ""))
        return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])

    def _found(
        self, judged: Sequence[Item], rated: Sequence[Item], outcomes: Sequence[Outcome], counted: Counted
    ) -> Measured:
        verdicts = [_Number(item, self._yes(one)) for item, one in zip(judged, outcomes, strict=False)]
        with_it, without = outcomes[len(judged) :: 2], outcomes[len(judged) + 1 :: 2]
        gains = [_Number(item, _gain(*pair)) for item, *pair in zip(rated, with_it, without, strict=True)]
        return Measured(
            values={**_of_verdicts(verdicts, counted), **_of_gains(gains, counted)},
            by_band=_by_band(verdicts, gains),
            n=len(verdicts),
            n_failed=sum(one.value is None for one in verdicts),
        )

    def _yes(self, outcome: Outcome) -> float | None:
        """Give the probability of yes; None without a verdict that can be read."""
        if isinstance(outcome, JudgeFailure) or self.book.read_verdict(outcome.text) is None:
            return None
        return probability_of_yes(outcome.log_probabilities)


class _Number(NamedTuple):
    item: Item
    value: float | None


def _gain(with_it: Outcome, without: Outcome) -> float | None:
    """Difference of two log-probabilities in bits; None where one of them failed."""
    sums = [
        sum(token.log_probability for token in one.log_probabilities)
        for one in (with_it, without)
        if isinstance(one, JudgeReply) and one.log_probabilities
    ]
    return (sums[0] - sums[1]) / math.log(2) if len(sums) == 2 else None


def _bits(number: _Number) -> float:
    """Surprise at the right answer.

    >>> silent = Item(truth=False, prompt_id=0, kind="silent", image_ids=())
    >>> _bits(_Number(silent, 0.75)), _bits(_Number(silent, 1.0))
    (2.0, 10.0)
    """
    right = (number.value or 0.0) if number.item.truth else 1.0 - (number.value or 0.0)
    return min(-math.log2(right), MOST_BITS) if right > 0 else MOST_BITS


def _of_verdicts(numbers: Sequence[_Number], counted: Counted) -> dict[str, float]:
    known = [one for one in numbers if one.value is not None]
    # as certain as can be, of what is true or of its opposite
    certain = [
        one._replace(value=float(one.item.truth is (counted == "right"))) for one in numbers if one.value is None
    ]
    found: dict[str, float] = {}
    for ending, group in (("", known), ("_strict", [*known, *certain])):
        firing, silent = ([_bits(one) for one in group if one.item.truth is truth] for truth in (True, False))
        if firing and silent:
            found[f"surprisal_bits{ending}"] = float((np.mean(firing) + np.mean(silent)) / 2)
        found |= _ranked(f"auroc{ending}", group)
    return found


def _of_gains(numbers: Sequence[_Number], counted: Counted) -> dict[str, float]:
    known = [one for one in numbers if one.value is not None]
    if not known:
        return {}
    found: dict[str, float] = {}
    for name, truth in (("gain_bits", True), ("gain_bits_silent", False)):
        values = [one.value for one in known if one.item.truth is truth and one.value is not None]
        found |= {name: float(np.mean(values))} if values else {}
    ends = [
        one._replace(value=math.inf if one.item.truth is (counted == "right") else -math.inf)
        for one in numbers
        if one.value is None
    ]
    return {**found, **_ranked("gain_auroc", known), **_ranked("gain_auroc_strict", [*known, *ends])}


def _ranked(name: str, numbers: Sequence[_Number]) -> dict[str, float]:
    """Tell firing items from silent ones by their numbers; nothing where one kind is missing."""
    firing, silent = (
        np.array([one.value for one in numbers if one.item.truth is truth], dtype=np.float64) for truth in (True, False)
    )
    return {name: auroc(firing, silent)} if len(firing) and len(silent) else {}


def _by_band(verdicts: Sequence[_Number], gains: Sequence[_Number]) -> dict[str, dict[str, float]]:
    rows = [(one.item, {"surprisal_bits": _bits(one)}) for one in verdicts if one.value is not None]
    rows += [(one.item, {"gain_bits": one.value}) for one in gains if one.value is not None]
    firing = [(item, row) for item, row in rows if item.truth]
    return by_named_band([band_of(item.kind, item.quantile) for item, _ in firing], [row for _, row in firing])
