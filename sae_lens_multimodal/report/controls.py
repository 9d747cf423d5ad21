"""A page of control sets: what was tried, what was chosen, how it did on prompts never seen, and the answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.report.formats import number
from sae_lens_multimodal.report.single_page import SinglePage
from sae_lens_multimodal.report.view import PictureView, TickView

if TYPE_CHECKING:
    from sae_lens_multimodal.hooks.control_records import AnswerPair, Control, ControlSet, Outcome, Trial

PAGE = SinglePage(kind="controls", what="control sets", schema_version=1)
WIDTH, HEIGHT = 420.0, 150.0
THUMBNAIL_SIDE = 112
"""Pixels of the longer side of a thumbnail."""


@dataclass(frozen=True, kw_only=True)
class CurveView:
    """Success and side effects by strength, in a drawing's own units."""

    success: str
    """The points of a polyline."""
    side_effects: str
    ticks: tuple[TickView, ...]
    summary: str
    """The drawing in words."""
    width: float = WIDTH
    height: float = HEIGHT


@dataclass(frozen=True, kw_only=True)
class AnswersView:
    """Some held-out prompts of one sort with their answers, and how many more there are."""

    title: str
    shown: tuple[tuple[AnswerPair, tuple[PictureView, ...]], ...]
    """Answers, with thumbnails of what the prompt shows."""
    n_more: int


@dataclass(frozen=True, kw_only=True)
class ControlView:
    """One control set as the page shows it."""

    title: str
    chosen: str
    """The set in words."""
    outcomes: tuple[tuple[str, Outcome], ...]
    """The set first, then what it is compared with."""
    curve: CurveView | None
    trail: tuple[tuple[str, Trial], ...]
    """The sets that the search went through, in words."""
    answers: tuple[AnswersView, ...]
    """Examples and guard examples."""
    found: ControlSet


def build_control_report(
    sets: Mapping[str, ControlSet],
    *,
    output: Path | str,
    title: str = "Features that control answers",
    n_answers: int = 12,
) -> Path:
    """Write a folder with one page of control sets, which opens in a browser from disk, and the numbers as JSON.

    Args:
        sets: what `find_controls` gave, by the name that the page shows.
        output: the folder to write; one with an earlier page of this kind is replaced.
        title: of the page.
        n_answers: how many examples and how many guard examples of each set are shown with their pictures; the rest are
            counted, and all of them are in the JSON file, without pictures.

    Returns:
        The page.

    Raises:
        ConfigError: there are no sets, or fewer than 0 answers are to be shown.
        StoreError: the folder holds something else.
    """
    if not sets:
        raise ConfigError("Got no control sets; expected at least one.")
    if n_answers < 0:
        raise ConfigError(f"Got n_answers={n_answers}; expected 0 or more.")
    views = [control_view(name, found, n_answers) for name, found in sets.items()]
    return PAGE.write(output, title=title, views=views, numbers={name: one.to_dict() for name, one in sets.items()})


def control_view(name: str, found: ControlSet, n_answers: int = 12) -> ControlView:
    """Turn a control set into what the page shows."""
    others = [(one.what, one) for one in (found.random, found.mean_difference) if one is not None]
    examples = [pair for pair in found.answers if pair.wanted is not None]
    guards = [pair for pair in found.answers if pair.wanted is None]
    return ControlView(
        title=name,
        chosen=_all_in_words(found.controls) or "nothing: no change was better than none",
        outcomes=(("these features", found.held_out), *others),
        curve=_curve(found),
        trail=tuple((_all_in_words(trial.controls) or "no change", trial) for trial in found.trail),
        answers=tuple(
            _answers(title, pairs, n_answers)
            for title, pairs in (("Examples", examples), ("Guard examples, which are to stay as they were", guards))
            if pairs
        ),
        found=found,
    )


def _answers(title: str, pairs: Sequence[AnswerPair], most: int) -> AnswersView:
    shown = tuple((pair, tuple(map(_thumbnail, pair.pictures))) for pair in pairs[:most])
    return AnswersView(title=title, shown=shown, n_more=len(pairs) - len(shown))


def _thumbnail(picture: Image.Image) -> PictureView:
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    url = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return PictureView(url=url, width=small.width, height=small.height, alt="what the prompt shows")


def _all_in_words(controls: Sequence[Control]) -> str:
    return ", ".join(map(_in_words, controls))


def _in_words(control: Control) -> str:
    if control.direction == "ablate":
        return f"feature {control.feature} ablated"
    return f"feature {control.feature} at {number(control.strength)} times its 99th percentile"


def _curve(found: ControlSet) -> CurveView | None:
    points = sorted(found.curve, key=lambda point: point.factor)
    if len(points) < 2:
        return None
    most = points[-1].factor or 1.0

    def line(values: Sequence[float]) -> str:
        pairs = zip(points, values, strict=True)
        return " ".join(f"{WIDTH * p.factor / most:.1f},{HEIGHT * (1 - value):.1f}" for p, value in pairs)

    last = points[-1]
    return CurveView(
        success=line([point.success for point in points]),
        side_effects=line([point.side_effects for point in points]),
        ticks=tuple(
            TickView(position=WIDTH * p.factor / most, label=number(p.factor) if p.factor else "ablated")
            for p in points
        ),
        summary=(
            f"Share of examples answered as wanted and of guard examples changed, by strength: {number(last.success)} "
            f"and {number(last.side_effects)} at {number(last.factor)} times the strengths chosen."
        ),
    )
