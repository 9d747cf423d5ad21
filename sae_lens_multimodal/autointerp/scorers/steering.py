"""Steering: does raising the feature make the model say what the explanation names?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeFailure
from sae_lens_multimodal.autointerp.measures import Measured, Measurer
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

    def measure(self, text: str, examples: HeldOut, rng: np.random.Generator) -> Measured:
        """Compare three sets of answers."""
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
        found, n_failed, strict = {}, 0, 0.0
        for name, lines in answers.items():
            said = self._said(text, lines)
            if said is None:
                return Measured(note="the prompt book has no words for this explanation")
            usable = [one for one in said if one is not None]
            n_failed += len(said) - len(usable)
            if usable:
                found[name] = sum(usable) / len(usable)
            if name == "said":
                strict = sum(bool(one) for one in said) / len(said)
        if len(found) == len(answers):
            found["effect"] = found["said"] - max(found["said_before"], found["said_random"])
        return Measured(values={**found, "said_strict": strict}, n=3 * len(self.conversations), n_failed=n_failed)

    def _answers(self, feature: int, height: float) -> list[str]:
        """Answer with one feature set; the explanation and its control meet the same answers."""
        key = (feature, height)
        if key not in self._steered:
            steered = steer(self.model, self.sae, {feature: Set(height)})
            self._steered = {key: steered.answer(self.conversations, max_new_tokens=self.max_new_tokens)} | dict(
                list(self._steered.items())[-3:]
            )
        return self._steered[key]

    def _said(self, text: str, answers: Sequence[str]) -> list[bool | None] | None:
        """Have the judge read the answers; one without words names nothing."""
        asked = [(index, self.book.detect_text(text, line)) for index, line in enumerate(answers) if line]
        if any(request is None for _, request in asked):
            return None
        said: list[bool | None] = [False] * len(answers)
        requests = [request for _, request in asked if request is not None]
        for (index, _), outcome in zip(asked, self.judge.ask_all(requests, progress=False), strict=True):
            said[index] = None if isinstance(outcome, JudgeFailure) else self.book.read_verdict(outcome.text)
        return said
