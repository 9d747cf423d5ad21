"""The view model: all that the templates show, as plain frozen data with addresses relative to the report's folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from sae_lens_multimodal.report.view_judged import RunView

ModalityName: TypeAlias = Literal["image", "text", "both"]


@dataclass(frozen=True, kw_only=True)
class PictureView:
    """A picture file of the report."""

    url: str
    """Relative to the report's folder."""
    width: int
    height: int
    alt: str = ""


class PatchView(NamedTuple):
    """A patch on which the feature is active, in thousandths of the picture's sides and of what counts as fully lit."""

    x0: int
    y0: int
    x1: int
    y1: int
    level: int
    """1 to 1000."""


@dataclass(frozen=True, kw_only=True)
class PatchesView:
    """Where a feature is active in a picture, by the view of the picture that the model had."""

    base: tuple[PatchView, ...]
    """Patches of the view of the whole picture, the weakest first."""
    tiles: tuple[PatchView, ...]
    """Patches of the tiles, the weakest first."""


@dataclass(frozen=True, kw_only=True)
class HeatView:
    """A picture, where the feature is active in it, and a close view of that place."""

    picture: PictureView
    heat: PatchesView | None
    """To be laid over the picture; None where the feature is silent."""
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
    quantile: float | None
    """Of an ordinary example: about which share of the prompts in which the feature is active it is weaker in."""
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
class NegativeView:
    """A region on which the feature is silent though it looks like those on which it is active."""

    picture: PictureView
    prompt: str
    source: str
    """Where it comes from, in words."""


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
    scale_text: float
    """Activation on text tokens at which a mark is fully lit."""
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
class TableView:
    """A small table whose cells are text already."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


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
    modality: ModalityName | None
    statistics: FeatureStatistics
    runs: tuple[RunView, ...]
    """What explainers and judges said, the report's own run first."""
    side_by_side: TableView | None
    """The runs' explanations and numbers; None where there is one run only."""
    examples: tuple[ExampleGroupView, ...]
    negatives: tuple[NegativeView, ...]
    histograms: tuple[HistogramView, ...]
    output_tokens: tuple[OutputTokenView, ...]
    description: DescriptionView | None
    steering: tuple[SteeringView, ...]
    previous: LinkView | None
    next: LinkView | None


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
    score_names: tuple[str, ...]
    """Of the report's own run."""
    measure_names: tuple[str, ...] = ()
    """Numbers of measures, of the report's own run."""
    compared: bool = False
    """Whether other runs are compared on a page of their own."""


@dataclass(frozen=True, kw_only=True)
class ComparisonView:
    """Another run beside the report's own, on the page that compares runs."""

    name: str
    url: str
    """Of its data, relative to the report's folder."""
    table: TableView
    sentences: tuple[str, ...]
