"""From the view model to HTML, through autoescaping templates, and to the data that the index searches."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sae_lens_multimodal.report import formats
from sae_lens_multimodal.report.tokens import snippet
from sae_lens_multimodal.report.view import ExampleView, FeatureView, ReportView

THUMBNAILS = 5
SNIPPETS = 3
SEARCHED_TOKENS = 24
STATIC_FILES = ("report.css", "index.js", "feature.js")


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
    )
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":"), "ensure_ascii": False}
    return made


def _level(value: float) -> str:
    """Spell a share for a style, between 0 and 1."""
    return f"{min(1.0, max(0.0, value)):.3f}".rstrip("0").rstrip(".")


def render_feature(report: ReportView, feature: FeatureView) -> str:
    """Return a feature's page."""
    has_heat = any(
        view.heat is not None
        for group in feature.examples
        for example in (*group.pictures, *group.texts)
        for view in example.pictures
    )
    page = environment().get_template("feature.html.j2")
    return page.render(report=report, feature=feature, root="../", has_heat=has_heat)


def render_index(report: ReportView, rows: list[dict[str, Any]], *, sort: str) -> str:
    """Return the index.

    Args:
        report: what is the same on all pages.
        rows: `index_row` of every feature.
        sort: the order at first: "index", or "score:" and the name of a score.
    """
    data = {"features": rows, "scores": list(report.score_names), "sort": sort}
    return environment().get_template("index.html.j2").render(report=report, data=data, root="")


def static_text(name: str) -> str:
    """Return one of the style sheet and scripts."""
    return (files("sae_lens_multimodal.report") / "static" / name).read_text(encoding="utf-8")


def index_row(feature: FeatureView) -> dict[str, Any]:
    """Return what the index shows and searches of a feature, as JSON values."""
    top = [group for group in feature.examples if group.kind == "top"]
    pictures = [example for group in top for example in group.pictures]
    texts = [example for group in top for example in group.texts]
    return {
        "index": feature.index,
        "url": feature.url,
        "label": feature.label,
        "named": feature.named,
        "explanation": " ".join(one.text for one in feature.explanations),
        "modality": feature.modality,
        "share": _rounded(feature.statistics.modality_score),
        "density": _rounded(feature.statistics.density),
        "image": _rounded(feature.statistics.density_image),
        "text": _rounded(feature.statistics.density_text),
        "max": _rounded(feature.statistics.max_activation),
        "scores": {
            score.name: {"value": _rounded(score.value), "control": _rounded(score.control)} for score in feature.scores
        },
        "thumbs": _thumbs(pictures),
        "snippets": [snippet(example.tokens) for example in texts[:SNIPPETS]],
        "tokens": _searched(pictures + texts),
        "outputs": [token.token for token in feature.output_tokens],
    }


def _rounded(value: float | None) -> float | None:
    """Keep five significant digits: enough to sort by, and short."""
    return None if value is None else float(f"{value:.5g}")


def _thumbs(examples: list[ExampleView]) -> list[str]:
    """Addresses of the close views of the strongest pictures."""
    views = [view for example in examples for view in example.pictures[:1]]
    return [(view.crop or view.picture).url for view in views[:THUMBNAILS]]


def _searched(examples: list[ExampleView]) -> list[str]:
    """Tokens of text on which the feature is active, the strongest first, each once."""
    lit = [token for example in examples for token in example.tokens if token.kind == "text" and token.level > 0]
    ordered = sorted(lit, key=lambda token: -token.value)
    return list(dict.fromkeys(token.text.strip() for token in ordered))[:SEARCHED_TOKENS]
