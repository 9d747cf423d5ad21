"""Steering: does raising the feature make the model say what the explanation names?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeFailure, Outcome
from sae_lens_multimodal.autointerp.measurer import Counted, Measured, Measurer, Plan
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.changes import Set
from sae_lens_multimodal.hooks.steer import steer

if TYPE_CHECKING:
    from sae_lens import SAE

    from sae_lens_multimodal.adapters.model import VisionLanguageModel
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.selection import HeldOut
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.types import Conversation


class SteeringScorer(Measurer):
    """Sets the feature high, has the model answer, and has a judge say whether the answers name what is explained.

    An output-side test, after Gur-Arieh et al. 2025: an explanation from inputs need not say what a feature does.
    `said` is the share of answers of the steered model that the judge finds to name it, `said_before` that of the
    model as it is, `said_random` that with another feature set as high; `effect` is `said` less the greater of these.
    In the strict numbers an answer without a verdict counts against the explanation in all three.

    Args:
        model: the model that the SAE reads.
        sae: the SAE.
        store: says how high a feature goes.
        judge: who reads the answers.
        book: its phrases.
        conversations: what the model is asked; about pictures or not.
        strength: how high, as a multiple of the feature's 99th percentile.
        max_new_tokens: the longest answer.
    """

    name: ClassVar[str] = "steering"
    judge: Judge
    modalities: ClassVar[tuple[Any, ...]] = ("image", "text")

    def __init__(
        self,
        model: VisionLanguageModel,
        sae: SAE,
        store: FeatureStore,
        judge: Judge,
        book: PromptBook,
        conversations: Sequence[Conversation],
        *,
        strength: float = 2.0,
        max_new_tokens: int = 32,
    ) -> None:
        if not conversations or strength <= 0:
            raise ConfigError(f"{len(conversations)} conversations, strength={strength}; expected some, and above 0.")
        self.model, self.sae, self.store, self.judge, self.book = model, sae, store, judge, book
        self.conversations, self.strength, self.max_new_tokens = list(conversations), strength, max_new_tokens
        self._plain: list[str] | None = None
        self._steered: dict[tuple[int, float], list[str]] = {}

    def settings(self) -> dict[str, Any]:
        """Give judge, phrases and numbers."""
        return {
            "judge": self.judge.cache_name,
            "prompts": self.book.version,
            "model": str(self.model.name),
            "n_conversations": len(self.conversations),
            "strength": self.strength,
            "max_new_tokens": self.max_new_tokens,
        }

    def plan(self, text: str, examples: HeldOut, rng: np.random.Generator) -> Plan | Measured:
        """Have the model answer three times, and ask about the answers; one without words names nothing."""
        height = self.strength * self.store.scale(examples.feature)
        others = [one for one in self.store.features if one != examples.feature]
        if height <= 0 or not others:
            return Measured(note="the feature never fires")
        other = others[int(rng.integers(len(others)))]
        self._plain = self._plain or self.model.answer(self.conversations, max_new_tokens=self.max_new_tokens)
        answers = {
            "said_before": self._plain,
            "said": self._answers(examples.feature, height),
            "said_random": self._answers(other, height),
        }
        lines = [line for part in answers.values() for line in part]
        asked = [self.book.detect_text(text, line) if line else None for line in lines]
        requests = [request for request in asked if request is not None]
        if len(requests) < sum(bool(line) for line in lines):
            return Measured(note="the prompt book has no words for this explanation")
        return Plan(
            requests=requests, finish=lambda outcomes, counted: self._found(list(answers), lines, outcomes, counted)
        )

    def _found(
        self, names: Sequence[str], lines: Sequence[str], outcomes: Sequence[Outcome], counted: Counted
    ) -> Measured:
        left, said = iter(outcomes), []
        for line in lines:
            outcome = next(left) if line else None
            read = self.book.read_verdict(outcome.text) if outcome and not isinstance(outcome, JudgeFailure) else None
            said.append(read if line else False)
        each = len(self.conversations)
        parts = {name: said[start : start + each] for name, start in zip(names, range(0, len(said), each), strict=True)}
        usable = {name: [one for one in part if one is not None] for name, part in parts.items()}
        found = {name: sum(part) / len(part) for name, part in usable.items() if part}
        if len(found) == len(names):
            found["effect"] = _effect(found)
        # of the answers that the explanation is compared with, a failure counts the other way round
        for_it = counted == "right"
        strict = {
            name: sum((name == "said") == for_it if one is None else one for one in part) / len(part)
            for name, part in parts.items()
        }
        return Measured(
            values={**found, "said_strict": strict["said"], "effect_strict": _effect(strict)},
            n=len(said),
            n_failed=sum(one is None for one in said),
        )

    def _answers(self, feature: int, height: float) -> list[str]:
        """Answer with one feature set; the explanation and its control meet the same answers."""
        key = (feature, height)
        if key not in self._steered:
            steered = steer(self.model, self.sae, {feature: Set(height)})
            self._steered = {key: steered.answer(self.conversations, max_new_tokens=self.max_new_tokens)} | dict(
                list(self._steered.items())[-3:]
            )
        return self._steered[key]


def _effect(said: Mapping[str, float]) -> float:
    return said["said"] - max(said["said_before"], said["said_random"])
