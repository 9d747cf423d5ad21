"""A page of dose curves: how an answer's probability and the side effects change with a feature's strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.report.formats import number
from sae_lens_multimodal.report.single_page import SinglePage
from sae_lens_multimodal.report.view import TickView

if TYPE_CHECKING:
    from sae_lens_multimodal.hooks.dose_curve import DoseCurve, DosePoint

PAGE = SinglePage(kind="dose", what="dose curves", schema_version=1)
WIDTH, HEIGHT = 420.0, 150.0
_TICKS = 5


@dataclass(frozen=True, kw_only=True)
class DotView:
    """One measured point."""

    x: float
    y: float
    title: str
    chosen: bool
    """Whether it is the point that the curve recommends."""


@dataclass(frozen=True, kw_only=True)
class ChartView:
    """One quantity by strength, in a drawing's own units."""

    caption: str
    kind: str
    """`target` or `side`, for its colour."""
    line: str
    """The points of a polyline."""
    dots: tuple[DotView, ...]
    x_ticks: tuple[TickView, ...]
    y_ticks: tuple[TickView, ...]
    baseline: float | None
    """Height of the value without steering."""
    summary: str
    """The drawing in words."""
    width: float = WIDTH
    height: float = HEIGHT


@dataclass(frozen=True, kw_only=True)
class DoseView:
    """One curve as the page shows it."""

    title: str
    about: str
    charts: tuple[ChartView, ...]
    curve: DoseCurve
    best: DosePoint | None


def build_dose_report(
    curves: Sequence[DoseCurve], *, output: Path | str, title: str = "Dose and response", max_side_effect: float = 0.1
) -> Path:
    """Write a folder with one page of dose curves, which opens in a browser from disk, and the numbers as JSON.

    Args:
        curves: what `dose_response` gave.
        output: the folder to write; one with an earlier page of this kind is replaced.
        title: of the page.
        max_side_effect: in nats; the strongest response with no more than this is marked.

    Returns:
        The page.

    Raises:
        ConfigError: there are no curves.
        StoreError: the folder holds something else.
    """
    if not curves:
        raise ConfigError("Got no dose curves; expected at least one.")
    views = [dose_view(curve, max_side_effect=max_side_effect) for curve in curves]
    return PAGE.write(output, title=title, views=views, numbers=[curve.to_dict() for curve in curves])


def dose_view(curve: DoseCurve, *, max_side_effect: float = 0.1) -> DoseView:
    """Turn a curve into what the page draws."""
    best = curve.best(max_side_effect=max_side_effect)
    side = "the guard prompts' answers" if curve.n_guard else "the other answers"
    verb = {"set": "set to", "add": "raised by", "scale": "scaled by"}[curve.kind]
    unit = "strength" if curve.kind == "scale" else f"strength times {number(curve.unit)}"
    guards = f", guarded by {curve.n_guard}" if curve.n_guard else ""
    return DoseView(
        title=f"{curve.name} → {curve.target}",
        about=f"The activation is {verb} {unit}. Means over {curve.n_prompts} prompts{guards}.",
        charts=(
            _chart(
                curve,
                [point.target for point in curve.points],
                f"Probability of “{curve.target}”",
                kind="target",
                top=1.0,
                best=best,
                baseline=curve.baseline,
            ),
            _chart(
                curve,
                [curve.side_effect(point) for point in curve.points],
                f"How far {side} move (KL divergence, nats)",
                kind="side",
                top=None,
                best=best,
                baseline=None,
            ),
        ),
        curve=curve,
        best=best,
    )


def _chart(
    curve: DoseCurve,
    values: Sequence[float],
    caption: str,
    *,
    kind: str,
    top: float | None,
    best: DosePoint | None,
    baseline: float | None,
) -> ChartView:
    strengths = [point.strength for point in curve.points]
    low, high = min(*strengths, 0.0), max(*strengths, 0.0)
    wide = (high - low) or 1.0
    most = top or max(*values, 0.0) or 1.0
    order = sorted(range(len(values)), key=lambda place: strengths[place])

    def across(strength: float) -> float:
        return round(WIDTH * (strength - low) / wide, 2)

    def up(value: float) -> float:
        return round(HEIGHT * (1 - value / most), 2)

    dots = tuple(
        DotView(
            x=across(strengths[place]),
            y=up(values[place]),
            title=f"strength {number(strengths[place])}: {number(values[place])}",
            chosen=curve.points[place] is best,
        )
        for place in order
    )
    ends = f"{number(values[order[0]])} at {number(strengths[order[0]])}, {number(values[order[-1]])} at"
    return ChartView(
        caption=caption,
        kind=kind,
        line=" ".join(f"{dot.x},{dot.y}" for dot in dots),
        dots=dots,
        x_ticks=tuple(TickView(position=across(tick), label=number(tick)) for tick in _ticks(low, low + wide)),
        y_ticks=tuple(TickView(position=up(tick), label=number(tick)) for tick in (0.0, most / 2, most)),
        baseline=None if baseline is None else up(baseline),
        summary=f"{caption} by strength: {ends} {number(strengths[order[-1]])}, at most {number(max(values))}.",
    )


def _ticks(low: float, high: float) -> list[float]:
    return [low + (high - low) * place / (_TICKS - 1) for place in range(_TICKS)]
