"""What a caller hands to the report and no lower layer defines: runs, output tokens, steered answers and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from PIL import Image

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.explanation import Explanation
    from sae_lens_multimodal.autointerp.measurer import Measure
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.results import Score, Verdict

Cell: TypeAlias = str | int | float | None
"""One cell of a table; None is shown as a dash."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way of explaining the features of a store and of judging the explanations, and what came of it.

    Another explainer, procedure or judge is another run.
    """

    name: str = ""
    """What pages call it; "" where there is no other."""
    explanations: Sequence[Explanation] = ()
    """What the features were said to respond to."""
    scores: Sequence[Score] = ()
    """How well that fits."""
    verdicts: Sequence[Verdict] = ()
    """Every answer of the judge behind the scores."""
    measures: Sequence[Measure] = ()
    """Numbers without a verdict, as `measure` gives them."""
    judge: str = ""
    """Who gave the verdicts; "" where that is not known."""
    prompts: PromptBook | None = None
    """The phrases that the judge was asked with; with them each question is shown word for word."""


@dataclass(frozen=True, kw_only=True)
class SteeringRecord:
    """One answer of the model as it is, and the same with a feature changed."""

    prompt: str
    """What was asked."""
    before: str
    """The answer of the model as it is."""
    after: str
    """The answer with the feature changed."""
    edit: str
    """What was changed, in a few words: "set to 8 on image tokens"."""
    image: Image.Image | Path | None = None
    """The picture that was asked about."""


class OutputToken(NamedTuple):
    """A token that a feature writes towards, as `top_output_tokens` gives it."""

    token: str
    logit: float
    """Direct effect on the token's logit."""


@dataclass(frozen=True, kw_only=True)
class SummaryTable:
    """A small table at the head of the report."""

    caption: str
    columns: Sequence[str]
    """Headings; the first column names the rows."""
    rows: Sequence[Sequence[Cell]]
    """As many cells in every row as there are columns."""
    note: str = ""
    """One sentence below the table: how to read it."""
