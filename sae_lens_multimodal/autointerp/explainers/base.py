"""What an explainer is: a procedure that makes explanations of features with a judge's help, and what it works with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sae_lens_multimodal.autointerp.explainers.words import PictureTexts
from sae_lens_multimodal.autointerp.explanation import Explanation, ModalityName
from sae_lens_multimodal.autointerp.judges.base import FailureKind, Judge, JudgeFailure, JudgeRequest, Outcome

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.features.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every procedure works with."""

    store: FeatureStore
    book: PromptBook
    judge_id: str
    n_examples: int
    n_contrast: int
    threshold: float
    context: int
    seed: int

    @cached_property
    def picture_texts(self) -> PictureTexts:
        """What is said of all pictures of the store; read when first asked for."""
        return PictureTexts.of(self.store)

    def rng(self, feature: int, modality: ModalityName) -> np.random.Generator:
        """Give a source of chance that depends on seed, feature and modality alone."""
        return np.random.default_rng((self.seed, feature, modality == "text"))


class Procedure(ABC):
    """A way to explain features."""

    name: ClassVar[str]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that the explanations depend on, as JSON values."""

    @abstractmethod
    def explain(
        self, judge: Judge, context: Context, keys: Sequence[tuple[int, ModalityName]]
    ) -> Iterator[Explanation]:
        """Explain features, in any order; those without an example in the modality are left out."""


def answered(book: PromptBook, request: JudgeRequest, blank: Explanation, outcome: Outcome) -> Explanation:
    """Fill in what the judge said in reply to a question for one explanation."""
    if isinstance(outcome, JudgeFailure):
        return Explanation(**{**blank.__dict__, "failure": outcome})
    meaning = book.read_meaning(outcome.text)
    if meaning is None:
        return Explanation(**{**blank.__dict__, "failure": unparsable(request, outcome.text)})
    return Explanation(**{**blank.__dict__, "text": meaning.text, "label": meaning.label})


def unparsable(request: JudgeRequest, reply: str) -> JudgeFailure:
    """Say that an explainer's reply has another shape than asked for."""
    message = f"The explainer's reply is not in the shape asked for: {reply[:120]!r}."
    return JudgeFailure.of(request, FailureKind.UNPARSABLE, message, reply)
