"""The pages beside the report, with hostile words wherever words go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from sae_lens_multimodal.hooks.trace_findings import TraceStory
from sae_lens_multimodal.report.controls import build_control_report
from sae_lens_multimodal.report.dose import build_dose_report
from sae_lens_multimodal.report.trace import build_trace_report
from tests.report.report_sample import ALL_EVIL
from tests.report.test_control_page import control_set
from tests.report.test_dose_page import curve
from tests.report.test_trace_page import make_story

SINGLE_PAGES = ("dose", "controls", "trace")


def write_single_pages(folder: Path) -> None:
    """Write the pages of doses, controls and traces, each into a folder of its own."""
    found = curve(ALL_EVIL)
    points = tuple(replace(point, answers=(ALL_EVIL, ALL_EVIL)) for point in found.points)
    build_dose_report([replace(found, target=ALL_EVIL, points=points)], output=folder / "dose", title=ALL_EVIL)
    controls = replace(control_set(evil=ALL_EVIL), hook_name=ALL_EVIL)
    build_control_report({ALL_EVIL: controls}, output=folder / "controls", title=ALL_EVIL)
    picture = Image.new("RGB", (40, 20), (90, 90, 90))
    build_trace_report({ALL_EVIL: _story()}, output=folder / "trace", pictures={ALL_EVIL: picture}, title=ALL_EVIL)


def _story() -> TraceStory:
    story = make_story()
    units = [replace(one, label=ALL_EVIL) for one in story.trace.units]
    trace = replace(story.trace, answer=ALL_EVIL, corruption=ALL_EVIL, units=units)
    return replace(
        story,
        trace=trace,
        hook_name=ALL_EVIL,
        cell=story.cell._replace(label=ALL_EVIL),
        hottest=story.hottest._replace(label=ALL_EVIL),
        features=[replace(one, explanation=ALL_EVIL) for one in story.features],
    )
