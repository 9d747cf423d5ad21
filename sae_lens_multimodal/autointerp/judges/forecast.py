"""A dry run: what would be asked, and what it would cost, without asking anybody."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sae_lens_multimodal.autointerp.judges.base import FailureKind, Judge, JudgeFailure, JudgeRequest, Outcome
from sae_lens_multimodal.autointerp.judges.budget import Prices
from sae_lens_multimodal.autointerp.judges.cache import CachedJudge
from sae_lens_multimodal.autointerp.judges.wrapped import WrappedJudge


@dataclass(kw_only=True)
class Forecast:
    """What would be asked."""

    calls: int = 0
    """Requests that nobody answered yet; equal ones once."""
    cached: int = 0
    """Requests that the cache would answer."""
    pictures: int = 0
    """Pictures in the calls."""
    tokens_in: int = 0
    """Estimated."""
    tokens_out: int = 0
    """At most."""

    def line(self, prices: Prices | None = None) -> str:
        """Say it in one line."""
        text = (
            f"{self.calls} calls with {self.pictures} pictures, about {self.tokens_in} tokens in and at most "
            f"{self.tokens_out} out; {self.cached} more are answered already"
        )
        return text if prices is None else f"{text}; about {prices.of(self.tokens_in, self.tokens_out):.4g} in money"


class ForecastJudge(WrappedJudge):
    """Stands in for a judge and counts; every answer is a failure that says so, so let results go to a folder to drop.

    Scores and the general and published procedures ask the same whatever the answers are, so the forecast is exact but
    for the tokens. What the contrastive procedure asks depends on the answers: see `Contrastive.most_calls`.

    Args:
        judge: the one that would be asked; of a `CachedJudge` it is known what would cost nothing.
        tokens_per_picture: what the model makes of a picture; LLaVA-NeXT about 2900, others 250 to 1500.
        characters_per_token: of text.
    """

    def __init__(self, judge: Judge, *, tokens_per_picture: int = 1000, characters_per_token: float = 4.0) -> None:
        super().__init__(judge)
        self.tokens_per_picture, self.characters_per_token = tokens_per_picture, characters_per_token
        self.forecast = Forecast()
        self._seen: set[str] = set()

    def _replies(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, Outcome]]:
        for index, request in enumerate(requests):
            self._count(request)
            yield index, JudgeFailure.of(request, FailureKind.REJECTED, "A dry run: the judge was not asked.")

    def _count(self, request: JudgeRequest) -> None:
        known = request.digest in self._seen or (isinstance(self.judge, CachedJudge) and self.judge.knows(request))
        if known:
            self.forecast.cached += 1
            return
        self._seen.add(request.digest)
        self.forecast.calls += 1
        self.forecast.pictures += len(request.pictures)
        words = sum(len(part) for part in request.parts if isinstance(part, str))
        self.forecast.tokens_in += round(words / self.characters_per_token)
        self.forecast.tokens_in += self.tokens_per_picture * len(request.pictures)
        self.forecast.tokens_out += request.max_new_tokens
