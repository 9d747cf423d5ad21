"""What a search for controlling features found, with its rates, intervals, controls and curve."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from PIL import Image
from sae_lens import SAE

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.changes import Ablate, Change, Set
from sae_lens_multimodal.hooks.selection import StepName, Tokens
from sae_lens_multimodal.hooks.steer import steer
from sae_lens_multimodal.types import Conversation

Direction: TypeAlias = Literal["raise", "ablate"]
"""What is done to a feature: set to a value of its own kind, or taken away."""

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """A share with its 95% Wilson score interval (Wilson 1927).

    Questions about one picture are not independent. Where there are several, the interval is that of the effective
    number of groups of prompts, each group counted as one answer given again and again (Kish 1965, "Survey Sampling",
    with a correlation of 1 within groups): it is rather too wide than too narrow. Several random draws on the same
    prompts are one sample of prompts: their rate is the mean, with the interval of a single draw and the draws' range.

    Example:
        >>> rate = Rate(8, 10)
        >>> rate.share, round(rate.low, 3), round(rate.high, 3)
        (0.8, 0.49, 0.943)
    """

    count: float
    """Of several draws the mean."""
    total: int
    groups: tuple[int, ...] = ()
    """How many prompts each group has; empty where every prompt is a group by itself."""
    draws: tuple[float, ...] = ()
    """The share in each draw, where there are several."""

    @classmethod
    def of(cls, right: Sequence[bool], groups: Sequence[int]) -> Rate:
        """Count prompts, of which those with one number in `groups` belong together."""
        sizes = tuple(Counter(groups).values())
        return cls(sum(right), len(right), sizes if max(sizes, default=1) > 1 else ())

    @classmethod
    def mean(cls, draws: Sequence[Rate]) -> Rate:
        """The mean over draws that were asked the same prompts; one at least."""
        count = sum(one.count for one in draws) / len(draws)
        return cls(count, draws[0].total, draws[0].groups, tuple(one.share for one in draws))

    @property
    def share(self) -> float:
        """The share; NaN of nothing."""
        return self.count / self.total if self.total else math.nan

    @property
    def effective(self) -> float:
        """As how many independent prompts they count: with groups of m prompts, (Σm)² / Σm²."""
        return self.total**2 / sum(size**2 for size in self.groups) if self.groups else self.total

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self._bound(-1)

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self._bound(1)

    def _bound(self, sign: int) -> float:
        if not self.total:
            return math.nan
        n, p, z = self.effective, self.share, Z_95
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return min(max((p + z * z / (2 * n) + sign * half) / (1 + z * z / n), 0.0), 1.0)

    def __str__(self) -> str:
        """Spell it: "80% [49, 94] of 10"."""
        if not self.total:
            return "none asked"
        text = f"{100 * self.share:.0f}% [{100 * self.low:.0f}, {100 * self.high:.0f}] of {self.total}"
        if self.groups:
            text += f" in {len(self.groups)} groups"
        if self.draws:
            text += f", {len(self.draws)} draws from {100 * min(self.draws):.0f} to {100 * max(self.draws):.0f}%"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        known = self.total > 0
        return {
            "count": self.count,
            "total": self.total,
            "share": self.share if known else None,
            "low": self.low if known else None,
            "high": self.high if known else None,
            "n_groups": len(self.groups) or self.total,
            "effective": self.effective,
            "draws": [one if known else None for one in self.draws],
        }


@dataclass(frozen=True, kw_only=True)
class Control:
    """One feature and what is done to it."""

    feature: int
    direction: Direction
    strength: float
    """In units of the feature's scale; 0 where it is ablated."""
    scale: float
    """The 99th percentile of the feature's own activations, where it is active."""

    def change(self, factor: float = 1.0) -> Change:
        """The change as `steer` takes it; `factor` multiplies the strength."""
        return Ablate() if self.direction == "ablate" else Set(factor * self.strength * self.scale)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "feature": self.feature,
            "direction": self.direction,
            "strength": self.strength,
            "scale": self.scale,
        }


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A change that attribution proposed, and what it did by itself on the examples of the search."""

    control: Control
    """At the best of the strengths that were tried."""
    predicted: float
    """The change of the logit difference that attribution foretells at strength 1, a mean over examples."""
    success: float
    """Share of examples that begin with the wanted answer."""
    side_effects: float
    """Share of guard examples that begin with another answer than before."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            **self.control.to_dict(),
            "predicted": self.predicted,
            "success": self.success,
            "side_effects": self.side_effects,
        }


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A set of controls and what it did on the examples of the search."""

    controls: tuple[Control, ...]
    success: float
    side_effects: float
    score: float
    """What the search makes as large as it can."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "controls": [one.to_dict() for one in self.controls],
            "success": self.success,
            "side_effects": self.side_effects,
            "score": self.score,
        }


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The whole set at another strength, on the examples of the search."""

    factor: float
    """By which all strengths are multiplied; ablated features stay ablated."""
    success: float
    side_effects: float

    def to_dict(self) -> dict[str, float]:
        """Return it as plain JSON values."""
        return {"factor": self.factor, "success": self.success, "side_effects": self.side_effects}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an intervention did to held-out examples."""

    success: Rate
    """Examples answered as wanted."""
    side_effects: Rate
    """Guard examples answered otherwise than before."""
    what: str = ""
    """Which intervention."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"what": self.what, "success": self.success.to_dict(), "side_effects": self.side_effects.to_dict()}


@dataclass(frozen=True, kw_only=True)
class AnswerPair:
    """A held-out prompt with its answers."""

    conversation: Conversation = field(repr=False, compare=False)
    prompt: str
    wanted: str | None
    """None for a guard example, which is to stay as it was."""
    before: str
    after: str
    pictures: tuple[Image.Image, ...] = field(default=(), repr=False, compare=False)
    """As the model sees them."""

    def to_dict(self) -> dict[str, Any]:
        """Return the texts as plain JSON values."""
        return {"prompt": self.prompt, "wanted": self.wanted, "before": self.before, "after": self.after}


@dataclass(frozen=True, kw_only=True)
class ControlSet:
    """A small set of features that changes answers as wanted, measured on examples that the search never saw."""

    hook_name: str
    tokens: Tokens = field(repr=False, compare=False)
    steps: StepName
    controls: tuple[Control, ...]
    """Empty if nothing that was tried is better than leaving the model alone."""
    held_out: Outcome
    """The set on held-out examples."""
    before: Rate
    """Held-out examples answered as wanted without any change."""
    random: Outcome | None
    """Random features of the same activity in the set's place, the mean over several draws; None if not run."""
    mean_difference: Outcome | None
    """The difference of means as a vector in the set's place; None if no positive is answered as wanted by itself."""
    candidates: list[Candidate] = field(repr=False)
    """What was tried by itself, the best first."""
    trail: list[Trial] = field(repr=False)
    """The sets that the search went through."""
    curve: list[CurvePoint] = field(repr=False)
    """The whole set at several strengths."""
    answers: list[AnswerPair] = field(repr=False)
    """All held-out prompts, examples first."""
    n_search_examples: int
    n_search_guards: int
    n_positives: int
    """Positives that the search saw."""
    n_positives_left_out: int
    """Positives that it did not see, as they show what is held out."""
    pictures_shared: bool
    """Whether pictures of held-out prompts were seen by the search after all, as there were too few to divide."""
    seed: int

    def changes(self, factor: float = 1.0) -> dict[int, Change]:
        """The changes as `steer` takes them; `factor` multiplies the strengths."""
        return {one.feature: one.change(factor) for one in self.controls}

    def steer(self, model: VisionLanguageModel, sae: SAE[Any], *, factor: float = 1.0) -> VisionLanguageModel:
        """Return a copy of the model with the set applied.

        Raises:
            ConfigError: the set is empty.
        """
        if not self.controls:
            raise ConfigError("Got an empty control set: the search found nothing better than no change.")
        return steer(model, sae, self.changes(factor), tokens=self.tokens, steps=self.steps, hook_name=self.hook_name)

    def to_dict(self) -> dict[str, Any]:
        """Return what a report shows, as plain JSON values."""
        return {
            "hook_name": self.hook_name,
            "tokens": self.tokens if isinstance(self.tokens, str) else "given",
            "steps": self.steps,
            "controls": _dicts(self.controls),
            "held_out": self.held_out.to_dict(),
            "before": self.before.to_dict(),
            "random": None if self.random is None else self.random.to_dict(),
            "mean_difference": None if self.mean_difference is None else self.mean_difference.to_dict(),
            "candidates": _dicts(self.candidates),
            "trail": _dicts(self.trail),
            "curve": _dicts(self.curve),
            "answers": _dicts(self.answers),
            "n_search_examples": self.n_search_examples,
            "n_search_guards": self.n_search_guards,
            "n_positives": self.n_positives,
            "n_positives_left_out": self.n_positives_left_out,
            "pictures_shared": self.pictures_shared,
            "seed": self.seed,
        }


def _dicts(records: Sequence[Any]) -> list[dict[str, Any]]:
    return [one.to_dict() for one in records]
