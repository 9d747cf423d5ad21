"""What a caller hands to the report and no lower layer defines: output tokens, steered answers and summary tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from PIL import Image

Cell: TypeAlias = str | int | float | None
"""One cell of a table; None is shown as a dash."""


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
