"""What scoring gives: every verdict, a score for each feature and scorer, and the sum of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sae_lens_multimodal.autointerp.explanation import Explanation, ModalityName
from sae_lens_multimodal.autointerp.judges.base import JudgeFailure
from sae_lens_multimodal.autointerp.metrics import (
    CHANCE,
    Failures,
    Interval,
    balanced_accuracy,
    bootstrap_mean,
    rates,
)
from sae_lens_multimodal.autointerp.quantiles import band_of, rates_by_band
from sae_lens_multimodal.autointerp.records import lines_of_folder
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.types import Box

SCORES, VERDICTS, SUMMARY = "scores", "verdicts", "summary"
"""Names of the files."""
KIND = "scores"
"""What the manifest of their folder says."""
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One answer of the judge, and what it was shown."""

    feature: int
    modality: ModalityName
    scorer: str
    control: bool
    """Whether it was asked with another feature's explanation."""
    position: int
    """Place in the shuffled order, from 0; the control has the same items in the same order."""
    explanation: str
    """The words it was asked with."""
    truth: bool
    """The right answer for the feature's own explanation."""
    answer: bool | None
    """None where there is no usable answer."""
    prompt_id: int
    kind: str
    """Of which list the example is: top, ordinary or silent."""
    image: int | None
    """Which picture of the prompt was shown."""
    box: Box | None
    """Which part of it, in pixels; None for all of it."""
    text: str | None
    """Which text, with its marks."""
    failure: JudgeFailure | None
    style: RegionStyle | None = None
    """How the judge saw that part, its margin in pixels; None for a whole picture or a text."""
    quantile: float | None = None
    """Of an ordinary example, see `Example.quantile`."""

    def to_json(self) -> dict[str, Any]:
        """Give the verdict as JSON values."""
        return {**asdict(self), "failure": self.failure.to_json() if self.failure else None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verdict:
        """Read what `to_json` gave."""
        box, failure, style = value["box"], value["failure"], value.get("style")
        return cls(
            **{
                **value,
                "box": None if box is None else Box(*box),
                "failure": None if failure is None else JudgeFailure.from_json(failure),
                "style": None if style is None else RegionStyle(**style),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well one explanation did in one test, beside another feature's explanation in the same test."""

    feature: int
    modality: ModalityName
    scorer: str
    explanation: str
    explanation_digest: str = ""
    """`Explanation.digest` of it: its words, and what its explainer saw."""
    note: str = ""
    """Why there is no score, where there is none."""
    balanced_accuracy: float | None = None
    """Mean of the accuracies on firing and silent items, failures left out; 0.5 is chance."""
    balanced_accuracy_strict: float | None = None
    """The same, failures counted as wrong."""
    tpr: float | None = None
    """Share of yes on items on which the feature fires."""
    fpr: float | None = None
    """Share of yes on items on which it is silent."""
    n: int = 0
    """Items asked about."""
    n_failed: int = 0
    """Items without a usable answer."""
    n_not_asked: int = 0
    """Items that the prompt book has no words for."""
    control_feature: int | None = None
    """Whose explanation the control was asked with."""
    control_explanation: str | None = None
    control_balanced_accuracy: float | None = None
    control_balanced_accuracy_strict: float | None = None
    """The same, failures counted as right: they must not speak for the explanation."""
    control_n_failed: int = 0
    tpr_by_band: Mapping[str, float] = field(default_factory=dict)
    """Share of yes on firing items of like activation: of the top list, and of quarters of the quantiles."""
    tpr_by_band_strict: Mapping[str, float] = field(default_factory=dict)
    """The same, failures counted as wrong."""

    @property
    def lift(self) -> float | None:
        """Balanced accuracy above that of the control; None where either is missing."""
        return _difference(self.balanced_accuracy, self.control_balanced_accuracy)

    @property
    def lift_strict(self) -> float | None:
        """The same, every failure counted against the explanation."""
        return _difference(self.balanced_accuracy_strict, self.control_balanced_accuracy_strict)

    def to_json(self) -> dict[str, Any]:
        """Give the score as JSON values."""
        return {**asdict(self), "lift": self.lift, "lift_strict": self.lift_strict}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Score:
        """Read what `to_json` gave."""
        return cls(**{key: value[key] for key in value.keys() - {"lift", "lift_strict"}})


def _difference(value: float | None, control: float | None) -> float | None:
    return None if value is None or control is None else value - control


def score_of(
    *,
    feature: int,
    modality: ModalityName,
    scorer: str,
    explanation: str,
    explanation_digest: str = "",
    control: tuple[int, str] | None,
    verdicts: Sequence[Verdict],
    n_not_asked: int,
) -> Score:
    """Put the verdicts on one explanation, and on its control, together.

    Args:
        feature: the feature.
        modality: of the items.
        scorer: name of the scorer.
        explanation: its own explanation.
        explanation_digest: of that explanation.
        control: whose explanation the control was asked with, and that explanation.
        verdicts: all on this feature by this scorer.
        n_not_asked: items that were not asked about.
    """
    own, other = ([one for one in verdicts if one.control is control_] for control_ in (False, True))
    truths, answers = [one.truth for one in own], [one.answer for one in own]
    control_truths, control_answers = [one.truth for one in other], [one.answer for one in other]
    found = rates(truths, answers)
    return Score(
        feature=feature,
        modality=modality,
        scorer=scorer,
        explanation=explanation,
        explanation_digest=explanation_digest,
        note=_note(truths, answers, n_not_asked),
        balanced_accuracy=balanced_accuracy(truths, answers),
        balanced_accuracy_strict=balanced_accuracy(truths, answers, failures="wrong"),
        tpr=found.tpr,
        fpr=found.fpr,
        n=len(own),
        n_failed=sum(one.failure is not None for one in own),
        n_not_asked=n_not_asked,
        control_feature=None if control is None else control[0],
        control_explanation=None if control is None else control[1],
        control_balanced_accuracy=balanced_accuracy(control_truths, control_answers),
        control_balanced_accuracy_strict=balanced_accuracy(control_truths, _in_its_favour(other)),
        control_n_failed=sum(one.failure is not None for one in other),
        tpr_by_band=_by_band(own, "missing"),
        tpr_by_band_strict=_by_band(own, "wrong"),
    )


def _in_its_favour(verdicts: Sequence[Verdict]) -> list[bool | None]:
    """Answers with failures counted as right: what fails of a control must not speak for the explanation."""
    return [one.truth if one.failure is not None else one.answer for one in verdicts]


def _by_band(verdicts: Sequence[Verdict], failures: Failures) -> dict[str, float]:
    firing = [one for one in verdicts if one.truth and one.kind != "silent"]
    bands = [band_of(one.kind, one.quantile) for one in firing]
    return rates_by_band(bands, [one.answer for one in firing], failures=failures)


def unscored(explanation: Explanation, scorer: str) -> Score:
    """Give the score of a feature without an explanation: no numbers, but why."""
    return Score(
        feature=explanation.feature,
        modality=explanation.modality,
        scorer=scorer,
        explanation="",
        explanation_digest=explanation.digest,
        note="the explainer failed" if explanation.failure else "the explainer found nothing in common",
    )


def _note(truths: Sequence[bool], answers: Sequence[bool | None], n_not_asked: int) -> str:
    """Say why there is no balanced accuracy."""
    if balanced_accuracy(truths, answers) is not None:
        return ""
    if len(set(truths)) == 2:
        return "the judge gave no usable answer on one kind of item"
    if n_not_asked:
        return "the prompt book has no words for this explanation"
    return (
        "too few held-out examples: none on which the feature fires, or none on which it is silent, at the same places "
        "and in words that were not read"
    )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How the explanations of all features did in one test."""

    scorer: str
    modality: ModalityName
    n_features: int
    """Features that were to be scored."""
    n_scored: int
    """Features with a balanced accuracy."""
    n_unexplained: int
    """Features whose explainer failed or found nothing in common."""
    n_verdicts: int
    """Items asked about, without the control."""
    n_failed: int
    """Of these, without a usable answer."""
    balanced_accuracy: Interval | None
    """Mean over the scored features."""
    control_balanced_accuracy: Interval | None
    lift: Interval | None
    """Over the features that have a score and a control."""
    lift_strict: Interval | None
    """Over all features: failures wrong, and no lift where there is no explanation or no score."""
    tpr_by_band: Mapping[str, Interval | None] = field(default_factory=dict)
    """Share of yes on firing items by activation, over the features that have such items."""

    def to_json(self) -> dict[str, Any]:
        """Give the summary as JSON values; intervals by name."""
        values = {
            key: value._asdict() if isinstance(value, Interval) else value for key, value in self.__dict__.items()
        }
        bands = {band: found._asdict() for band, found in self.tpr_by_band.items() if found is not None}
        return {**values, "tpr_by_band": bands}


def summarise(scores: Sequence[Score], *, seed: int = 0, level: float = 0.95) -> list[Summary]:
    """Sum up scores by scorer and modality, with bootstrap intervals over features.

    Args:
        scores: of all features.
        seed: of the bootstrap.
        level: of the intervals.
    """
    groups = sorted({(score.scorer, score.modality) for score in scores})
    return [
        _summary([score for score in scores if (score.scorer, score.modality) == group], *group, seed, level)
        for group in groups
    ]


def _summary(scores: Sequence[Score], scorer: str, modality: ModalityName, seed: int, level: float) -> Summary:
    def interval(values: Sequence[float | None]) -> Interval | None:
        return bootstrap_mean([value for value in values if value is not None], seed=seed, level=level)

    controlled = any(score.control_feature is not None for score in scores)
    return Summary(
        scorer=scorer,
        modality=modality,
        n_features=len(scores),
        n_scored=sum(score.balanced_accuracy is not None for score in scores),
        n_unexplained=sum(not score.explanation for score in scores),
        n_verdicts=sum(score.n for score in scores),
        n_failed=sum(score.n_failed for score in scores),
        balanced_accuracy=interval([score.balanced_accuracy for score in scores]),
        control_balanced_accuracy=interval([score.control_balanced_accuracy for score in scores]),
        lift=interval([score.lift for score in scores]),
        lift_strict=interval([_strict(score) for score in scores] if controlled else []),
        tpr_by_band={
            band: interval([score.tpr_by_band.get(band) for score in scores])
            for band in sorted({band for score in scores for band in score.tpr_by_band})
        },
    )


def _strict(score: Score) -> float | None:
    """Lift with every failure against the explanation; None only where no control could be asked."""
    if score.balanced_accuracy_strict is None:
        return 0.0
    control = score.control_balanced_accuracy_strict
    if score.control_feature is None:
        return None
    return score.balanced_accuracy_strict - (CHANCE if control is None else control)


def read_scores(folder: Path | str) -> list[Score]:
    """Read the scores in a folder that `score` made; none where it has made none yet.

    Raises:
        StoreError: the folder is not one that `score` made, or a line is not a JSON object.
    """
    lines = lines_of_folder(folder, SCORES, kind=KIND, schema_version=SCHEMA_VERSION)
    return [Score.from_json(record) for _, record in lines]


def read_verdicts(folder: Path | str) -> list[Verdict]:
    """Read the verdicts in a folder that `score` made; none where it has made none yet.

    Raises:
        StoreError: the folder is not one that `score` made, or a line is not a JSON object.
    """
    lines = lines_of_folder(folder, VERDICTS, kind=KIND, schema_version=SCHEMA_VERSION)
    return [Verdict.from_json(record) for _, record in lines]
