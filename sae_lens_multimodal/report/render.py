"""From the view model to HTML, through autoescaping templates, and to the data that the index searches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from sae_lens_multimodal.report import formats
from sae_lens_multimodal.report.colours import ALPHA, VEIL, ramp
from sae_lens_multimodal.report.patches import packed
from sae_lens_multimodal.report.script_data import script_json

if TYPE_CHECKING:
    from sae_lens_multimodal.report.view import ComparisonView, FeatureView, ReportView

STATIC_FILES = ("report.css", "common.js", "heat.js", "map.js", "index.js", "feature.js", "compare.js")


@cache
def environment() -> Environment:
    """Make the template environment: everything is escaped, a missing name is an error."""
    made = Environment(
        loader=PackageLoader("sae_lens_multimodal.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        share=formats.share,
        number=formats.number,
        count=formats.count,
        score=formats.score,
        visible=formats.visible,
        plural=formats.plural,
        level=_level,
        patches=packed,
        script_json=script_json,
    )
    return made


def _level(value: float) -> str:
    """Spell a share for a style, between 0 and 1."""
    return f"{min(1.0, max(0.0, value)):.3f}".rstrip("0").rstrip(".")


def render_feature(report: ReportView, feature: FeatureView) -> str:
    """Return a feature's page."""
    examples = [example for group in feature.examples for example in (*group.pictures, *group.texts)]
    heats = [view.heat for example in examples for view in example.pictures if view.heat is not None]
    page = environment().get_template("feature.html.j2")
    return page.render(
        report=report,
        feature=feature,
        root="../",
        has_heat=bool(heats),
        has_views=any(heat.base for heat in heats) and any(heat.tiles for heat in heats),
        has_marks=any(token.level > 0 and token.kind == "text" for example in examples for token in example.tokens),
        colours={"ramp": ramp(), "veil": VEIL, "alpha": ALPHA},
    )


def render_index(report: ReportView) -> str:
    """Return the index; its features are in files beside it, see `index_data`."""
    return environment().get_template("index.html.j2").render(report=report, root="")


def render_comparison(report: ReportView, views: Sequence[ComparisonView]) -> str:
    """Return the page that compares runs; the features are in files beside it."""
    return environment().get_template("compare.html.j2").render(report=report, views=views, root="")


def static_text(name: str) -> str:
    """Return one of the style sheet and scripts."""
    return (files("sae_lens_multimodal.report") / "static" / name).read_text(encoding="utf-8")
