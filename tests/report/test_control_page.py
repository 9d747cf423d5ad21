"""The page of control sets: every number of the set is on it, nothing of an answer is taken for markup."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import Chrome

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
    Trial,
)
from sae_lens_multimodal.report.controls import HEIGHT, THUMBNAIL_SIDE, WIDTH, build_control_report, control_view

EVIL = "</td><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


def pair(number: int, wanted: str | None, n_pictures: int = 1) -> AnswerPair:
    """The answer to a prompt with wide pictures, each of another colour."""
    pictures = tuple(Image.new("RGB", (640, 320), (40 * number, 200, 50 * k)) for k in range(n_pictures))
    prompt, before = f"what <b> is {number} ?", "red"
    return AnswerPair(
        conversation=[], prompt=prompt, wanted=wanted, before=before, after=f"<i>{number}", pictures=pictures
    )


def control_set(*, empty: bool = False, shared: bool = False, evil: str = "blue") -> ControlSet:
    control = Control(feature=12, direction="raise", strength=2.0, scale=1.5)
    ablated = Control(feature=7, direction="ablate", strength=0.0, scale=1.0)
    chosen = Trial(controls=(control, ablated), success=0.625, side_effects=0.125, score=0.377)
    return ControlSet(
        hook_name="blocks.1.hook_resid_post",
        tokens="last",
        steps="prefill",
        controls=() if empty else (control, ablated),
        held_out=Outcome(success=Rate(8, 10), side_effects=Rate(2, 10, groups=(2,) * 5)),
        before=Rate(0, 10),
        random=Outcome(
            success=Rate.mean([Rate(0, 10), Rate(1, 10)]), side_effects=Rate(6, 10), what=f"random features, {evil}"
        ),
        mean_difference=None,
        candidates=[Candidate(control=control, predicted=1.25, success=0.75, side_effects=0.0)],
        trail=[Trial(controls=(), success=0.0, side_effects=0.0, score=-0.05), chosen],
        curve=[
            CurvePoint(factor=2.0, success=1.0, side_effects=0.5),
            CurvePoint(factor=0.0, success=0.0, side_effects=0.0),
        ],
        answers=[
            *(pair(n, evil) for n in range(5)),
            pair(5, None, n_pictures=3),
            AnswerPair(conversation=[], prompt=evil, wanted=None, before=evil, after=evil),
        ],
        n_search_examples=11,
        n_search_guards=9,
        n_positives=6,
        n_positives_left_out=2,
        pictures_shared=shared,
        seed=0,
    )


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    page = build_control_report({"say red": control_set()}, output=tmp_path / "out").read_text(encoding="utf-8")
    for text in (
        "say red",
        "feature 12 at 2 times its 99th percentile, feature 7 ablated",
        "80% [49, 94] of 10",
        "20% [4, 62] of 10 in 5 groups",
        "5% [1, 34] of 10, 2 draws from 0 to 10%",
        "Searched on 11 examples and 9 guard examples, with 6 prompts that should be",
        "(2 more left out, as they show what is held out)",
        "what &lt;b&gt; is 3 ?",
        "&lt;i&gt;3",
        "75 %",
        "on prompts and pictures never seen",
        "95% intervals by Wilson",
        # the trail
        '<th scope="row">no change</th><td>0 %</td><td>0 %</td><td>-0.05</td>',
        "feature 7 ablated</th><td>62 %</td><td>12 %</td><td>0.377</td>",
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
    assert [(one.position, one.label) for one in curve.ticks] == [(0.0, "ablated"), (WIDTH, "2")]


def thumbnails(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/webp;base64,([^"]+)" width="(\d+)" height="(\d+)"', page)
    pictures = [Image.open(io.BytesIO(base64.b64decode(one))) for one, _, _ in found]
    assert [one.size for one in pictures] == [(int(width), int(height)) for _, width, height in found]
    return pictures


def test_answers_come_with_what_was_seen(tmp_path: Path) -> None:
    page = build_control_report({"x": control_set()}, output=tmp_path / "out").read_text(encoding="utf-8")
    pictures = thumbnails(page)
    assert [one.size for one in pictures] == [(THUMBNAIL_SIDE, THUMBNAIL_SIDE // 2)] * 8
    for number, one in enumerate(pictures[:5]):
        red, green, blue = one.convert("RGB").getpixel((50, 20))  # type: ignore[misc]
        assert abs(red - 40 * number) + abs(green - 200) + blue < 12
    assert "in controls.json" not in page


def test_few_answers_are_shown_and_the_rest_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    page = build_control_report({"x": control_set()}, output=folder, n_answers=1).read_text(encoding="utf-8")
    assert len(thumbnails(page)) == 1 + 3
    assert "4 more are in controls.json" in page
    assert "1 more is in controls.json" in page
    assert len(read_json(folder / "controls.json")["x"]["answers"]) == 7
    page = build_control_report({"x": control_set()}, output=folder, n_answers=0).read_text(encoding="utf-8")
    assert thumbnails(page) == []
    assert "5 more are in controls.json" in page
    with pytest.raises(ConfigError, match="n_answers=-1"):
        build_control_report({"x": control_set()}, output=folder, n_answers=-1)


def test_shared_pictures_are_said(tmp_path: Path) -> None:
    page = build_control_report({"x": control_set(shared=True)}, output=tmp_path / "out").read_text(encoding="utf-8")
    assert "The search saw pictures of prompts that were held out" in page
    assert "never seen" not in page
    assert read_json(tmp_path / "out" / "controls.json")["x"]["pictures_shared"] is True


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_as_a_reader_sees_it(browser: Chrome, tmp_path: Path, width: int) -> None:
    sets = {EVIL: control_set(evil=EVIL), "second": control_set(shared=True)}
    page = build_control_report(sets, output=tmp_path / "out", title=EVIL)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(f"file://{page}")
    assert browser.execute_script("return window.hacked") is None
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.querySelectorAll('script, [onerror]').length") == 0
    assert browser.execute_script("return document.querySelector('h1').textContent") == EVIL
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    shown = "return [...document.images].filter(one => one.complete && one.naturalWidth > 0).length"
    browser.execute_script("document.querySelectorAll('img').forEach(one => { one.loading = 'eager'; })")
    browser.execute_async_script("Promise.all([...document.images].map(one => one.decode())).then(arguments[0])")
    assert browser.execute_script(shown) == 16
    # sections follow one another, none stays on top of the next
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    tops = browser.execute_script(
        "return [...document.querySelectorAll('.control-set')].map(one => one.getBoundingClientRect().bottom)"
    )
    assert tops[0] < tops[1]
    assert (
        browser.execute_script("return getComputedStyle(document.querySelector('.control-set')).position") == "static"
    )


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
