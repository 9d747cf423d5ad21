"""The view model: all that the templates show, as plain frozen data with addresses relative to the report's folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

ModalityName: TypeAlias = Literal["image", "text", "both"]


@dataclass(frozen=True, kw_only=True)
class PictureView:
    """A picture file of the report."""

    url: str
    """Relative to the report's folder."""
    width: int
    height: int
    alt: str = ""


@dataclass(frozen=True, kw_only=True)
class HeatView:
    """A picture, where the feature is active in it, and a close view of that place."""

    picture: PictureView
    heat: PictureView | None
    """Semi-transparent, to be laid over the picture; None where the feature is silent."""
    crop: PictureView | None
    peak: float
    """Largest activation within this picture."""


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """One token of text, or a run of tokens that stand for something else."""

    text: str
    kind: Literal["text", "special", "picture", "gap"]
    """A "picture" stands for all the tokens of one picture; a "gap" for text left out."""
    value: float
    """Activation; the largest one of a run."""
    level: float
    """Share of the activation that counts as fully lit, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class ExampleView:
    """One prompt on which the feature was looked at."""

    rank: int
    """From 1."""
    prompt: str
    """The prompt's name or number in the dataset."""
    max_activation: float
    """Largest one on tokens of the list's modality."""
    mean_activation: float
    """Mean over tokens of the list's modality, silent ones included."""
    level: float
    """Largest activation as a share of what counts as fully lit, 0 to 1."""
    pictures: tuple[HeatView, ...]
    tokens: tuple[TokenView, ...]


@dataclass(frozen=True, kw_only=True)
class ExampleGroupView:
    """The examples of one kind."""

    kind: Literal["top", "ordinary", "silent"]
    pictures: tuple[ExampleView, ...]
    """Ranked or drawn by activations on image tokens."""
    texts: tuple[ExampleView, ...]
    """Ranked or drawn by activations on text tokens."""

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self.pictures) + len(self.texts)


@dataclass(frozen=True, kw_only=True)
class ExplanationView:
    """What an explainer said of a feature, from its images or from its texts."""

    modality: Literal["image", "text"]
    text: str
    status: Literal["explained", "nothing in common", "failed"]
    reason: str
    """Why there is none, where the explainer failed."""
    judge: str
    """Who explained."""


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
class BarView:
    """One bar of a histogram, in the drawing's own units."""

    x: float
    y: float
    width: float
    height: float
    title: str
    """Range and count in words."""


@dataclass(frozen=True, kw_only=True)
class TickView:
    """One mark on an axis."""

    position: float
    label: str


@dataclass(frozen=True, kw_only=True)
class HistogramView:
    """Activations of one modality's tokens; counts on a logarithmic axis."""

    modality: Literal["image", "text", "all"]
    width: float
    height: float
    bars: tuple[BarView, ...]
    x_ticks: tuple[TickView, ...]
    y_ticks: tuple[TickView, ...]
    total: int
    summary: str
    """For readers who do not see the drawing."""


@dataclass(frozen=True, kw_only=True)
class OutputTokenView:
    """A token that the feature writes towards."""

    token: str
    logit: float
    share: float
    """Of the largest one in absolute value, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class VerdictView:
    """One question to the judge, and what became of it."""

    picture: PictureView | None
    """What was asked about: a region as the judge saw it, or outlined in its picture."""
    shown: str
    """The text that was asked about, with its marks."""
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
    verdicts: tuple[VerdictView, ...]

    @property
    def right(self) -> int:
        """Number of right answers; in a control, of those that agree with the feature."""
        return sum(verdict.outcome == "right" for verdict in self.verdicts)


@dataclass(frozen=True, kw_only=True)
class SpanView:
    """A piece of a steered answer."""

    text: str
    changed: bool
    """Differs from the answer before."""


@dataclass(frozen=True, kw_only=True)
class SteeringView:
    """An answer before and after."""

    edit: str
    prompt: str
    picture: PictureView | None
    before: tuple[SpanView, ...]
    after: tuple[SpanView, ...]
    same: bool


@dataclass(frozen=True, kw_only=True)
class LinkView:
    """A neighbouring page."""

    index: int
    label: str
    url: str
    """Relative to the report's folder."""


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """How often and how strongly a feature is active, by modality."""

    density: float
    """Share of all tokens with a non-zero activation."""
    density_image: float
    density_text: float
    max_activation: float
    scale_image: float
    """Activation on image tokens at which the heat map is fully lit."""
    modality_score: float | None
    """Mean activation on image tokens over the sum of both means: 1 is image only, 0 text only; None where silent."""
    prompts: int | None
    """Prompts on which the feature was active."""


@dataclass(frozen=True, kw_only=True)
class RelatedView:
    """Another feature that has to do with the page's."""

    index: int
    label: str
    url: str
    """Of its page, relative to the report's folder; "" where it has none."""
    value: float
    """How much, 0 to 1."""
    reading: str
    """The same as text."""
    hint: str
    """What it may be to the feature, in words."""


@dataclass(frozen=True, kw_only=True)
class DescriptionView:
    """What was found out about a feature after the pass."""

    monosemanticity: float | None
    """Mean cosine of the crops where it is active, weighted by activation."""
    random_crops: float | None
    """Mean cosine of all features' crops."""
    n_crops: int
    cross_modal: float | None
    """Mean cosine of its top image tokens with its top text tokens."""
    cross_modal_floor: float | None
    """The same with other features' tokens."""
    cofiring: tuple[RelatedView, ...]
    """Features that fire on the same tokens, by the share of tokens."""
    neighbours: tuple[RelatedView, ...]
    """Features of nearest decoder direction, by cosine."""
    n_tokens: int
    """Tokens that the shares rest on."""


@dataclass(frozen=True, kw_only=True)
class FeatureView:
    """One feature's page."""

    index: int
    url: str
    """Relative to the report's folder."""
    label: str
    """Short name: the explanation's, or "Feature 12"."""
    named: bool
    """The label comes from an explanation."""
    explanations: tuple[ExplanationView, ...]
    modality: ModalityName | None
    statistics: FeatureStatistics
    scores: tuple[ScoreView, ...]
    examples: tuple[ExampleGroupView, ...]
    histograms: tuple[HistogramView, ...]
    output_tokens: tuple[OutputTokenView, ...]
    description: DescriptionView | None
    verdicts: tuple[VerdictGroupView, ...]
    steering: tuple[SteeringView, ...]
    previous: LinkView | None
    next: LinkView | None


@dataclass(frozen=True, kw_only=True)
class TableView:
    """A small table whose cells are text already."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


@dataclass(frozen=True, kw_only=True)
class FactView:
    """A name and a value in the head of the report."""

    name: str
    value: str


@dataclass(frozen=True, kw_only=True)
class ReportView:
    """What is the same on all pages, and the index."""

    title: str
    facts: tuple[FactView, ...]
    tables: tuple[TableView, ...]
    n_features: int
    score_names: tuple[str, ...]
