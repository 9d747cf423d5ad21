"""The view model of what explainers and judges said of a feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_lens_multimodal.report.view import PictureView


@dataclass(frozen=True, kw_only=True)
class ShownView:
    """One thing that the explainer saw, or that the choice among its candidates was made on."""

    picture: PictureView | None
    text: str
    prompt: str
    active: bool
    """Whether the feature is active there."""


@dataclass(frozen=True, kw_only=True)
class CandidateView:
    """One of the explanations that were weighed."""

    text: str
    validation: float | None
    """Balanced accuracy on what the choice was made by."""
    confirmation: float | None
    """The same on what it was not made by; of the one that was chosen."""
    count: int
    """Questions that it rests on."""
    failed: int
    round: int
    """From 1."""
    kept: bool


@dataclass(frozen=True, kw_only=True)
class ExplanationView:
    """What an explainer said of a feature, from its images or from its texts, and what it saw."""

    modality: Literal["image", "text"]
    text: str
    status: Literal["explained", "nothing in common", "failed"]
    reason: str
    """Why there is none, where the explainer failed."""
    reply: str
    """What came in place of an explanation, word for word."""
    judge: str
    """Who explained."""
    procedure: str
    validation: float | None
    """Balanced accuracy on the validation split."""
    shown: tuple[ShownView, ...]
    """What the explainer saw, in that order."""
    validated_on: tuple[ShownView, ...]
    """What the choice among the candidates was made on."""
    candidates: tuple[CandidateView, ...]


@dataclass(frozen=True, kw_only=True)
class ScoreView:
    """One score with its control, as balanced accuracies: 0.5 is chance."""

    name: str
    value: float | None
    """None where nothing could be scored."""
    control: float | None
    """The same with another feature's explanation."""
    hits: float | None
    """Share of yes where the feature is active."""
    false_alarms: float | None
    """Share of yes where it is silent."""
    count: int
    """Questions that it rests on."""
    failed: int
    """Of these, without a usable answer."""
    note: str
    """Why there is no score, where there is none."""

    @property
    def lift(self) -> float | None:
        """Value over control."""
        return None if self.value is None or self.control is None else self.value - self.control


@dataclass(frozen=True, kw_only=True)
class MeasureView:
    """One number of a measure, with what it is to be compared with."""

    name: str
    key: str
    """The same with its measurer, as the index and comparisons call it."""
    value: float | None
    strict: float | None
    """The same, failures counted as wrong."""
    floor: float | None
    """The same of something random."""
    control: float | None
    """The same with another feature's explanation."""
    bands: tuple[tuple[str, float], ...]
    """The same for items of like activation."""


@dataclass(frozen=True, kw_only=True)
class MeasureGroupView:
    """What one measurer found of one explanation."""

    name: str
    numbers: tuple[MeasureView, ...]
    count: int
    """Items that it rests on."""
    failed: int
    """Of these, without a usable answer."""
    note: str
    """Why there are no numbers, where there are none."""


@dataclass(frozen=True, kw_only=True)
class VerdictView:
    """One question to the judge, and what became of it."""

    pictures: tuple[PictureView, ...]
    """What was asked about, as the judge saw it."""
    seen: str
    """In which way it was shown, in a few words."""
    shown: str
    """The text that was asked about, with its marks."""
    question: str
    """What the judge was asked, word for word, a mark for every picture; "" where that is not known."""
    prompt: str
    """The prompt's name or number in the dataset."""
    kind: str
    """Of which list the example is, and how strong, in a few words."""
    expected: str
    answer: str
    outcome: Literal["right", "wrong", "unanswered"]
    failure: str
    """Why there is no answer, in one line."""
    reply: str
    """What came in place of an answer, word for word."""


@dataclass(frozen=True, kw_only=True)
class VerdictGroupView:
    """The verdicts of one scorer, with the feature's explanation or with another's."""

    task: str
    """Name of the score."""
    control: bool
    """Asked with another feature's explanation."""
    explanation: str
    """The words it was asked with."""
    question: str
    """What the judge was asked, where that is the same for all; "" where it is not, or is not known."""
    seen: str
    """In which way pictures were shown, where that is the same for all."""
    verdicts: tuple[VerdictView, ...]

    @property
    def right(self) -> int:
        """Number of right answers; in a control, of those that agree with the feature."""
        return sum(verdict.outcome == "right" for verdict in self.verdicts)


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What the explainers, judges and measures of one run said of a feature."""

    name: str
    """"" for the report's own, where there is no other."""
    judge: str
    """Who judged; "" where that is not known."""
    explanations: tuple[ExplanationView, ...]
    scores: tuple[ScoreView, ...]
    measures: tuple[MeasureGroupView, ...]
    verdicts: tuple[VerdictGroupView, ...]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to be shown."""
        return not (self.explanations or self.scores or self.measures or self.verdicts)
