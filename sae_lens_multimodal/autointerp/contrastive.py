"""Explaining by contrast: several explanations are proposed, and the one that holds on other examples is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sae_lens_multimodal.autointerp.dealing import Dealer, Views
from sae_lens_multimodal.autointerp.explanation import Candidate, Explanation, ModalityName, Shown
from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeFailure, JudgeRequest
from sae_lens_multimodal.autointerp.metrics import Failures, balanced_accuracy
from sae_lens_multimodal.autointerp.negatives import HardNegatives
from sae_lens_multimodal.autointerp.procedures import Context, Procedure, read_answer, unparsable
from sae_lens_multimodal.autointerp.prompts import Meaning
from sae_lens_multimodal.autointerp.scorers import FuzzingScorer, Item
from sae_lens_multimodal.autointerp.selection import split_examples
from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_multimodal.features.embedding import Embed

_JUDGE = FuzzingScorer()
"""Candidates are tried on regions and marks, as this scorer does."""


@dataclass(frozen=True, kw_only=True)
class Contrastive(Procedure):
    """Proposes explanations from regions beside hard negatives, and keeps the one that does best on a validation split.

    A feature's examples are dealt out in three: the explainer sees the first part, the second is for validation, and
    the third is left for `score`, which checks that no prompt and no picture is in two of them. Every candidate is
    tried on one half of the validation items, until one is good enough. The best of them is then tried on the other
    half, once: of many candidates some does well by chance on what it was chosen on, so only this number is free of
    the choice, and decides whether the explanation is kept. A judge call for each candidate and item of the first
    half, and for each item of the second.
    """

    name: ClassVar[str] = "contrastive"
    n_candidates: int = 3
    """How many explanations are asked for at once, of explainers that can give several."""
    n_rounds: int = 4
    """How often the explainer is asked while none is good enough, each time about half as many examples, drawn anew."""
    n_validation: int = 8
    """Firing items of the validation split, and as many silent ones: half of each to choose by, half to confirm."""
    good_enough: float = 0.9
    """Balanced accuracy on the items to choose by at which the search ends."""
    least: float = 0.6
    """Balanced accuracy on the items to confirm by below which no explanation is kept: the feature has no common
    meaning then. Tossed coins reach .6 on eight items in 36 of 100 cases, and .75 in 14; a judge that is often wrong
    loses right explanations at .75."""
    neighbours: Mapping[int, Sequence[int]] = field(default_factory=dict, repr=False)
    """Of each feature the features with the nearest decoder directions, see `decoder_neighbours`. None given: those of
    the store, if its features were described."""
    embed: Embed | None = field(default=None, repr=False)
    """What makes pictures comparable, to find silent regions that look alike. None: the model's own vision tower, if
    the store's features were described."""
    embed_name: str = ""
    """Which embedding that is; recorded with the results."""

    def __post_init__(self) -> None:
        """Check the settings."""
        if min(self.n_candidates, self.n_rounds) < 1 or self.n_validation < 2:
            raise ConfigError(
                f"n_candidates={self.n_candidates}, n_rounds={self.n_rounds}, n_validation={self.n_validation}; "
                "expected at least 1, 1 and 2."
            )
        if not (0 <= self.least <= 1 and 0 <= self.good_enough <= 1):
            raise ConfigError(f"least={self.least}, good_enough={self.good_enough}; expected shares from 0 to 1.")

    def settings(self) -> dict[str, Any]:
        """Give the settings; the neighbours as a hash."""
        near = json.dumps(sorted((key, list(value)) for key, value in self.neighbours.items()))
        return {
            "name": self.name,
            "n_candidates": self.n_candidates,
            "n_rounds": self.n_rounds,
            "n_validation": self.n_validation,
            "good_enough": self.good_enough,
            "least": self.least,
            "neighbours": hashlib.sha256(near.encode()).hexdigest()[:12] if self.neighbours else None,
            "embed": self.embed_name if self.embed is not None else None,
        }

    @property
    def most_calls(self) -> int:
        """The most calls that one feature can take, if no proposal has variants; most take far fewer."""
        return self.n_rounds * (1 + self.n_candidates * (self.n_validation + 1)) + self.n_validation

    def explain(
        self, judge: Judge, context: Context, keys: Sequence[tuple[int, ModalityName]]
    ) -> Iterator[Explanation]:
        """Go through the rounds with all features at once, so that the judge has much to do at a time."""
        made = (_Search.of(self, context, *key) for key in keys)
        searches = [search for search in made if search is not None]
        for number in range(self.n_rounds):
            self._propose(judge, [one for one in searches if not one.is_settled], number)
            self._validate(judge, [one for one in searches if not one.is_settled])
            for search in searches:
                if not search.is_settled:
                    search.widen(number)
            self._validate(judge, [one for one in searches if not one.is_settled])
        self._confirm(judge, searches)
        yield from (search.explanation() for search in searches)

    def _propose(self, judge: Judge, searches: Sequence[_Search], number: int) -> None:
        asked = [(one, request) for one in searches if (request := one.proposal(number)) is not None]
        for index, outcome in judge.stream([request for _, request in asked]):
            search, request = asked[index]
            search.is_asked = True
            if isinstance(outcome, JudgeFailure):
                search.failure = outcome
                continue
            meanings = search.context.book.read_proposals(outcome.text)
            if meanings is None:
                search.failure = unparsable(request, outcome.text)
            else:
                search.add(meanings, number)

    def _validate(self, judge: Judge, searches: Sequence[_Search]) -> None:
        """Try new candidates on the items to choose by."""
        self._try(judge, [(search, one, search.to_choose) for search in searches for one in search.untried()])

    def _confirm(self, judge: Judge, searches: Sequence[_Search]) -> None:
        """Try the chosen candidates on the items that nothing was chosen by."""
        chosen = [(search, search.best) for search in searches if search.items]
        self._try(judge, [(search, one, search.to_confirm) for search, one in chosen if one is not None])

    def _try(self, judge: Judge, tests: Sequence[tuple[_Search, _Tried, Sequence[int]]]) -> None:
        asked: list[tuple[_Search, _Tried, int, JudgeRequest]] = []
        for search, tried, positions in tests:
            for position in positions:
                request = _JUDGE.request(search.context.book, tried.meaning.text, search.items[position])
                if request is not None:
                    asked.append((search, tried, position, request))
        for index, outcome in judge.stream([request for *_, request in asked]):
            search, tried, position, request = asked[index]
            answer = read_answer(search.context.book, request, outcome)
            tried.answers[position] = None if isinstance(answer, JudgeFailure) else answer
            tried.failure = answer if isinstance(answer, JudgeFailure) else tried.failure


@dataclass
class _Tried:
    """A candidate, and what the judge said of it."""

    meaning: Meaning
    round: int
    answers: dict[int, bool | None] = field(default_factory=dict)
    """By the item's position; None for a failure."""
    failure: JudgeFailure | None = None
    """The last one."""
    is_begun: bool = False


@dataclass
class _Search:
    """The search for one feature's explanation."""

    procedure: Contrastive
    context: Context
    feature: int
    modality: ModalityName
    active: list[Views]
    silent: list[Views]
    items: list[Item]
    image_ids: tuple[str, ...]
    rng: np.random.Generator
    candidates: list[_Tried] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    failure: JudgeFailure | None = None
    is_asked: bool = False

    @classmethod
    def of(cls, procedure: Contrastive, context: Context, feature: int, modality: ModalityName) -> _Search | None:
        """Deal the examples out; None where there are none to show."""
        rng = context.rng(feature, modality)
        negatives = HardNegatives(
            context.store, threshold=context.threshold, neighbours=procedure.neighbours or None, embed=procedure.embed
        )
        dealer = Dealer(context, feature, negatives, procedure.n_validation, rng)
        split = split_examples(
            context.store,
            feature,
            modality,
            n_explain=context.n_examples + 3,
            n_validate=procedure.n_validation,
            n_silent=context.n_contrast,
            rng=rng,
            text_of=dealer.text_of if modality == "text" else None,
        )
        active, silent = dealer.shown(split) if modality == "image" else dealer.shown_texts(split)
        if not active:
            return None
        items = dealer.items(split) if modality == "image" else dealer.text_items(split, [*active, *silent])
        used = {one.shown.prompt_id for one in (*active, *silent)} | {item.prompt_id for item in items}
        examples = (*split.explain, *split.explain_silent, *split.validate.firing, *split.validate.silent)
        names = {name for one in examples if one.prompt_id in used for name in one.image_ids}
        return cls(procedure, context, feature, modality, active, silent, items, tuple(sorted(names)), rng)

    @property
    def is_settled(self) -> bool:
        best = self.best
        return best is not None and (not self.items or (self.chosen_by(best) or 0.0) >= self.procedure.good_enough)

    @property
    def best(self) -> _Tried | None:
        """The candidate that did best on the items to choose by; of equals the first."""
        return max(self.candidates, key=lambda one: self.chosen_by(one) or 0.0, default=None)

    @property
    def to_choose(self) -> Sequence[int]:
        """Positions of every other item: of both kinds, see `_alternated`."""
        return range(0, len(self.items), 2)

    @property
    def to_confirm(self) -> Sequence[int]:
        """Positions of the others."""
        return range(1, len(self.items), 2)

    def chosen_by(self, tried: _Tried) -> float | None:
        """Balanced accuracy on the items to choose by, failures wrong; None where nothing was asked."""
        return self._accuracy(tried, self.to_choose)

    def confirmed_by(self, tried: _Tried, failures: Failures = "wrong") -> float | None:
        """The same on the items to confirm by."""
        return self._accuracy(tried, self.to_confirm, failures)

    def _accuracy(self, tried: _Tried, positions: Sequence[int], failures: Failures = "wrong") -> float | None:
        asked = [position for position in positions if position in tried.answers]
        truths = [self.items[position].truth for position in asked]
        found = balanced_accuracy(truths, [tried.answers[position] for position in asked], failures=failures)
        # equal shares must be equal numbers: the first of equals is kept
        return None if found is None else round(found, 9)

    def proposal(self, number: int) -> JudgeRequest | None:
        """Make the request of one round: the strongest examples first, then a choice by chance."""
        # later rounds show fewer: one example that does not belong hides what the others share
        count = min(-(-self.context.n_examples // 2**number), len(self.active))
        order = range(count) if number == 0 else sorted(self.rng.permutation(len(self.active))[:count].tolist())
        active = [self.active[index] for index in order]
        self.shown += [one.shown for one in (*active, *self.silent) if one.shown not in self.shown]
        book, n_candidates = self.context.book, self.procedure.n_candidates
        if self.modality == "image":
            quiet = [one.views[0] for one in self.silent]
            return book.propose_images([one.views for one in active], quiet, n_candidates)
        return book.propose_texts([one.text for one in active], [one.text for one in self.silent], n_candidates)

    def add(self, meanings: Sequence[Meaning], number: int) -> None:
        known = {one.meaning.text for one in self.candidates}
        for meaning in meanings:
            if meaning.text not in known:
                known.add(meaning.text)
                self.candidates.append(_Tried(meaning, number))

    def widen(self, number: int) -> None:
        """Add what is near to the best candidate and can be had without asking the explainer."""
        best = self.best
        if best is not None and self.items:
            self.add(self.context.book.variants(best.meaning), number)

    def untried(self) -> list[_Tried]:
        """Give the candidates that no item was asked about yet, and count them as begun."""
        fresh = [one for one in self.candidates if not one.is_begun]
        for one in fresh:
            one.is_begun = True
        return fresh if self.items else []

    def explanation(self) -> Explanation:
        """Say what came of it."""
        best = self.best
        kept = best if best is not None and self._holds(best) else None
        return Explanation(
            feature=self.feature,
            text="" if kept is None else kept.meaning.text,
            label="" if kept is None else kept.meaning.label,
            modality=self.modality,
            judge=self.context.judge_id,
            prompts=self.context.book.version,
            shown=tuple(self.shown),
            image_ids=self.image_ids,
            failure=self.failure if best is None else self._unconfirmed(best),
            procedure=self.procedure.name,
            candidates=tuple(self._record(one) for one in self.candidates),
            validated_on=tuple(
                Shown(prompt_id=item.prompt_id, active=item.truth, image=item.image, box=item.box, text=item.text)
                for item in self.items
            ),
        )

    def _holds(self, best: _Tried) -> bool:
        return not self.items or (self.confirmed_by(best) or 0.0) >= self.procedure.least

    def _unconfirmed(self, best: _Tried) -> JudgeFailure | None:
        """The judge's failure, where it alone keeps the candidate from being confirmed or refuted."""
        answered = self.confirmed_by(best, failures="missing")
        refuted = answered is not None and answered < self.procedure.least
        return None if self._holds(best) or refuted else best.failure

    def _record(self, one: _Tried) -> Candidate:
        return Candidate(
            text=one.meaning.text,
            label=one.meaning.label,
            validation=self.chosen_by(one),
            confirmation=self.confirmed_by(one),
            n=len(one.answers),
            n_failed=sum(answer is None for answer in one.answers.values()),
            round=one.round,
        )
