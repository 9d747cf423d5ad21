"""The page of control sets: every number of the set is on it, nothing of an answer is taken for markup."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_lens_multimodal.errors import ConfigError, StoreError
from sae_lens_multimodal.files import read_json
from sae_lens_multimodal.hooks.control_records import (
    AnswerPair,
    Candidate,
    Control,
    ControlSet,
    CurvePoint,
    Outcome,
    Rate,
)
from sae_lens_multimodal.report.controls import HEIGHT, WIDTH, build_control_report, control_view


def control_set(*, empty: bool = False) -> ControlSet:
    control = Control(feature=12, direction="raise", strength=2.0, scale=1.5)
    return ControlSet(
        hook_name="blocks.1.hook_resid_post",
        tokens="last",
        steps="prefill",
        controls=() if empty else (control, Control(feature=7, direction="ablate", strength=0.0, scale=1.0)),
        held_out=Outcome(success=Rate(8, 10), side_effects=Rate(1, 10)),
        before=Rate(0, 10),
        random=Outcome(success=Rate(1, 30), side_effects=Rate(6, 30)),
        mean_difference=None,
        candidates=[Candidate(control=control, predicted=1.25, success=0.75, side_effects=0.0)],
        trail=[],
        curve=[
            CurvePoint(factor=2.0, success=1.0, side_effects=0.5),
            CurvePoint(factor=0.0, success=0.0, side_effects=0.0),
        ],
        answers=[AnswerPair(conversation=[], prompt="what <b> is it ?", wanted=None, before="red", after="<i>blue")],
        n_search_examples=11,
        n_search_guards=9,
        seed=0,
    )


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    page = build_control_report({"say red": control_set()}, output=tmp_path / "out").read_text(encoding="utf-8")
    for text in (
        "say red",
        "feature 12 at 2 times its 99th percentile, feature 7 ablated",
        "80% [49, 94] of 10",
        "3% [1, 17] of 30",
        "Searched on 11 examples and 9 guard examples",
        "what &lt;b&gt; is it ?",
        "&lt;i&gt;blue",
        "75 %",
    ):
        assert text in page, text
    assert "difference of means" not in page
    assert "http://" not in page
    assert "https://" not in page
    stored = read_json(tmp_path / "out" / "controls.json")
    assert stored["say red"]["controls"][0]["feature"] == 12


def test_the_curve_lies_where_it_was_measured() -> None:
    curve = control_view("", control_set()).curve
    assert curve is not None
    assert curve.success == f"0.0,{HEIGHT} {WIDTH},0.0"
    assert curve.side_effects == f"0.0,{HEIGHT} {WIDTH},{HEIGHT / 2}"


def test_an_empty_set_is_said_to_be_one(tmp_path: Path) -> None:
    page = build_control_report({"x": control_set(empty=True)}, output=tmp_path / "out").read_text(encoding="utf-8")
    assert "no change was better than none" in page


def test_nothing_else_is_replaced(tmp_path: Path) -> None:
    build_control_report({"x": control_set()}, output=tmp_path / "out")
    build_control_report({"y": control_set()}, output=tmp_path / "out")
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(StoreError, match="give a new folder"):
        build_control_report({"x": control_set()}, output=tmp_path / "out")
    with pytest.raises(ConfigError, match="no control sets"):
        build_control_report({}, output=tmp_path / "new")
