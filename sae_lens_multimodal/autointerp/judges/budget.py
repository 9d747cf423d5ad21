"""A budget around any judge: so many calls, tokens or so much money, and then it stops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeRequest, Ledger, Outcome
from sae_lens_multimodal.autointerp.judges.wrapped import WrappedJudge
from sae_lens_multimodal.errors import ConfigError, JudgeError


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What a hosted model costs, in any currency."""

    input_per_million: float = 0.0
    """Of a million tokens that it reads."""
    output_per_million: float = 0.0
    """Of a million tokens that it writes."""

    def __post_init__(self) -> None:
        """Check the prices."""
        if min(self.input_per_million, self.output_per_million) < 0:
            raise ConfigError(f"{self}: a price cannot be negative.")

    def of(self, tokens_in: int, tokens_out: int) -> float:
        """Give the price of some tokens.

        Example:
            >>> Prices(input_per_million=2.0, output_per_million=10.0).of(500_000, 10_000)
            1.1
        """
        return (tokens_in * self.input_per_million + tokens_out * self.output_per_million) / 1e6


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent; None: as much as it takes."""

    max_calls: int | None = None
    max_tokens: int | None = None
    """Read and written, as the server counts them."""
    max_money: float | None = None
    """By the prices."""
    prices: Prices = field(default_factory=Prices)

    def __post_init__(self) -> None:
        """Check the limits."""
        limits = (self.max_calls, self.max_tokens, self.max_money)
        if any(limit is not None and limit < 0 for limit in limits):
            raise ConfigError(
                f"max_calls={limits[0]}, max_tokens={limits[1]}, max_money={limits[2]}; none may be negative."
            )
        if self.max_money is not None and self.prices == Prices():
            raise ConfigError("max_money needs prices: give what a million tokens cost.")

    def exceeded(self, spent: Ledger) -> str | None:
        """Say which limit is reached; None while there is something left."""
        if self.max_calls is not None and spent.calls >= self.max_calls:
            return f"{spent.calls} of {self.max_calls} calls"
        tokens = spent.tokens_in + spent.tokens_out
        if self.max_tokens is not None and tokens >= self.max_tokens:
            return f"{tokens} of {self.max_tokens} tokens"
        money = self.prices.of(spent.tokens_in, spent.tokens_out)
        if self.max_money is not None and money >= self.max_money:
            return f"{money:.4g} of {self.max_money:g} in money"
        return None


class BudgetJudge(WrappedJudge):
    """Asks the judge inside until the budget is spent, and then raises `JudgeError`; what was answered is kept.

    Put the cache outside, `CachedJudge(BudgetJudge(judge, budget), path)`: answers from it cost nothing. Requests are
    passed on a few at a time; calls never exceed the budget, tokens and money by at most those few.

    Args:
        judge: who answers.
        budget: what may be spent by this object, counted from 0.
        at_once: requests passed on at a time.
    """

    def __init__(self, judge: Judge, budget: Budget, *, at_once: int = 16) -> None:
        super().__init__(judge)
        if at_once < 1:
            raise ConfigError(f"at_once is {at_once}; expected at least 1.")
        self.budget, self.at_once = budget, at_once
        self._spent = Ledger()

    def _replies(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, Outcome]]:
        start = 0
        while start < len(requests):
            reached = self.budget.exceeded(self._spent)
            if reached is not None:
                raise JudgeError(
                    f"The budget is spent ({reached}); {len(requests) - start} requests of this batch are open. What "
                    "was answered so far is kept: give a larger budget and run again to go on."
                )
            count = self.at_once
            if self.budget.max_calls is not None:
                count = min(count, self.budget.max_calls - self._spent.calls)
            for index, outcome in self.judge.stream(requests[start : start + count]):
                self._spent.record(outcome, outcome)
                yield start + index, outcome
            start += count
