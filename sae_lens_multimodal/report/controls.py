"""A page of control sets: what was tried, what was chosen, how it did on prompts never seen, and the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.report.formats import number
from sae_lens_multimodal.report.single_page import SinglePage
from sae_lens_multimodal.report.view import TickView

if TYPE_CHECKING:
    from sae_lens_multimodal.hooks.control_records import Control, ControlSet, Outcome

PAGE = SinglePage(kind="controls", what="control sets", schema_version=1)
WIDTH, HEIGHT = 420.0, 150.0


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
class ControlView:
    """One control set as the page shows it."""

    title: str
    chosen: str
    """The set in words."""
    outcomes: tuple[tuple[str, Outcome], ...]
    """The set first, then what it is compared with."""
    curve: CurveView | None
    found: ControlSet


def build_control_report(
    sets: Mapping[str, ControlSet], *, output: Path | str, title: str = "Features that control answers"
) -> Path:
    """Write a folder with one page of control sets, which opens in a browser from disk, and the numbers as JSON.

    Args:
        sets: what `find_controls` gave, by the name that the page shows.
        output: the folder to write; one with an earlier page of this kind is replaced.
        title: of the page.

    Returns:
        The page.

    Raises:
        ConfigError: there are no sets.
        StoreError: the folder holds something else.
    """
    if not sets:
        raise ConfigError("Got no control sets; expected at least one.")
    views = [control_view(name, found) for name, found in sets.items()]
    return PAGE.write(output, title=title, views=views, numbers={name: one.to_dict() for name, one in sets.items()})


def control_view(name: str, found: ControlSet) -> ControlView:
    """Turn a control set into what the page shows."""
    others = (("random features of the same activity", found.random), ("difference of means", found.mean_difference))
    return ControlView(
        title=name,
        chosen=", ".join(map(_in_words, found.controls)) or "nothing: no change was better than none",
        outcomes=(("these features", found.held_out), *((what, one) for what, one in others if one is not None)),
        curve=_curve(found),
        found=found,
    )


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
        ticks=tuple(TickView(position=WIDTH * p.factor / most, label=number(p.factor)) for p in points),
        summary=(
            f"Share of examples answered as wanted and of guard examples changed, by strength: {number(last.success)} "
            f"and {number(last.side_effects)} at {number(last.factor)} times the strengths chosen."
        ),
    )
