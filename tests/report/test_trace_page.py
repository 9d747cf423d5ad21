"""The page of causal traces: every share has its place, the hot cell is marked, and nothing is taken for markup."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.files import read_json
from sae_lens_multimodal.hooks.trace_findings import Confirmation, FeatureFinding, MeanAblation, TraceStory
from sae_lens_multimodal.hooks.trace_result import CausalTrace, Cell, Unit
from sae_lens_multimodal.report.trace import CELL, build_trace_report, trace_view

PICTURE = Image.new("RGB", (40, 20), (90, 90, 90))


def make_trace() -> CausalTrace:
    """Two layers, four tokens: two halves of a picture, a word, the end."""
    nan = float("nan")
    layout = TokenLayout(
        modality=torch.tensor([[1, 1, 0, 3]], dtype=torch.int8),
        boxes=torch.tensor([[[0.0, 0, 20, 20], [20, 0, 40, 20], [nan] * 4, [nan] * 4]]),
        image_index=torch.tensor([[0, 0, -1, -1]]),
        tile=torch.tensor([[0, 0, -1, -1]]),
        image_sizes=(((40, 20),),),
    )
    values = torch.full((2, 2, 4), 0.1)
    values[0, 1, 2] = 0.9
    values[0, 0, 1] = 0.5
    values[1, 0, 3] = 0.0
    return CausalTrace(
        answer="<b>star",
        against=None,
        metric="probability",
        corruption="a region painted over",
        window=1,
        parts=["resid", "mlp_out"],
        layers=[0, 1],
        units=[Unit(f"picture 1, token {at}", (at,)) for at in (0, 1)] + [Unit(" <i>red", (2,)), Unit("end", (3,))],
        tokens=["p", "p", "<i>red", "end"],
        corrupted_tokens=["p", "p", "<i>red", "end"],
        layout=layout,
        clean={"probability": 0.9, "log_probability": -0.1},
        corrupted={"probability": 0.1, "log_probability": -2.3},
        values={"probability": values, "log_probability": values.log()},
        n_passes=3,
        n_skipped=0,
    )


def make_confirmation(**changed: float) -> Confirmation:
    found = Confirmation(
        restored=0.62,
        ablated=0.43,
        exchanged=0.54,
        restored_random=0.033,
        ablated_random=0.011,
        exchanged_random=0.022,
        n_random=8,
        weight_random=0.7,
    )
    return replace(found, **changed)


def make_story() -> TraceStory:
    trace = make_trace()
    finding = FeatureFinding(
        feature=77, clean=3.5, corrupted=0.0, restored=0.61, ablated=0.42, exchanged=0.53, explanation="<script>red"
    )
    return TraceStory(
        trace=trace,
        cell=Cell("resid", 1, 2, " <i>red", 1.0),
        hottest=trace.top(1)[0],
        hook_name="blocks.1.hook_resid_post",
        n_active=12,
        features=[finding],
        restored_all=0.83,
        together=make_confirmation(),
        held_out=[make_confirmation(restored=0.31, ablated=0.32, exchanged=0.33)],
    )


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    page = build_trace_report(
        {"what <u>is it</u> ?": make_story()}, output=tmp_path / "out", pictures={"what <u>is it</u> ?": PICTURE}
    ).read_text(encoding="utf-8")
    for text in (
        "what &lt;u&gt;is it&lt;/u&gt; ?",
        "&lt;b&gt;star",
        "&lt;i&gt;red",
        "&lt;script&gt;red",
        "0.61",
        "0.42",
        "0.53",
        "0.83",
        "0.62",
        "take 0.43 of the answer away",
        "with 0.70 of their weight, bring 0.03 back and take 0.01 and 0.02 away",
        "In held-out prompts (1 of 1): they bring 0.31 back; ablated in the clean run they take 0.32",
        "a region painted over",
    ):
        assert text in page, text
    for text in ("<u>", "<i>", "<script>red", "http://", "https://"):
        assert text not in page
    assert len(re.findall("<rect", page)) == 2 * 2 * 3
    assert page.count('class="hot"') == 1
    stored = read_json(tmp_path / "out" / "trace.json")
    assert stored["what <u>is it</u> ?"]["features"][0]["feature"] == 77


def test_means_over_reference_prompts_are_told_where_there_are_some(tmp_path: Path) -> None:
    story = make_story()
    without = build_trace_report({"x": story}, output=tmp_path / "out").read_text(encoding="utf-8")
    means = MeanAblation(found=0.18, others=0.07, all_features=0.21, value=0.28, random=-0.014)
    finding = replace(story.features[0], mean_ablated=0.13)
    story = replace(story, features=[finding], together=replace(story.together, mean_ablated=means))
    page = build_trace_report({"x": story}, output=tmp_path / "out").read_text(encoding="utf-8")
    for text in (
        "lost at its mean",
        "<td>0.13</td>",
        "they take 0.18, random sets \u22120.01, all features of the SAE but them 0.07, all of them 0.21, and",
        "which is the most that can be lost there, 0.28.",
    ):
        assert text in page, text
        assert text not in without
    assert read_json(tmp_path / "out" / "trace.json")["x"]["together"]["mean_ablated"]["value"] == 0.28


def test_tokens_of_a_picture_are_one_column_with_their_strongest() -> None:
    view = trace_view("x", make_story())
    grid = view.grids[0]
    assert grid.columns == ("picture 1", "<i>red", "end")
    assert grid.rows == ("1", "0")
    titles = {(cell.x // CELL, cell.y // CELL): cell.title for cell in grid.cells}
    assert titles[0, 1] == "picture 1, the strongest of 2 tokens, layer 0: 0.5"
    assert titles[1, 0] == "<i>red, layer 1: 1"
    hot = [cell for cell in grid.cells if cell.hot]
    assert [(cell.x, cell.y) for cell in hot] == [(CELL, 0)]
    assert hot[0].colour == "#fee838"
    assert next(cell for cell in view.grids[1].cells if cell.title.startswith("end, layer 0")).colour == "var(--wrong)"


def test_maps_are_bright_where_tokens_bring_something_back() -> None:
    view = trace_view("x", make_trace(), PICTURE)
    assert view.cell == ""
    assert view.features == ()
    assert [caption for caption, _ in view.maps] == ["Residual stream (brightest: 0.5)"]
    content = base64.b64decode(view.maps[0][1][0].url.partition(",")[2])
    painted = np.asarray(Image.open(io.BytesIO(content)), dtype=int)
    assert painted[:, : painted.shape[1] // 2 - 1].mean() + 60 < painted[:, painted.shape[1] // 2 + 1 :].mean()
    assert trace_view("x", make_trace()).maps == ()


def test_a_cell_that_undoes_the_corruption_is_called_that() -> None:
    plain = make_story()
    assert "merely undoes" not in trace_view("x", plain).cell
    assert "Of the whole trace" not in trace_view("x", replace(plain, cell=plain.hottest)).cell
    changed = replace(plain, trace=replace(plain.trace, changed_inputs=[2]))
    view = trace_view("x", changed)
    assert "merely undoes the corruption" in view.cell
    assert any(cell.title.startswith("<i>red (corrupted), layer 1") for cell in view.grids[0].cells)
    assert not any(cell.title.startswith("end (corrupted)") for cell in view.grids[0].cells)
    elsewhere = replace(changed, cell=Cell("resid", 1, 3, "end", 0.1))
    words = trace_view("x", elsewhere).cell
    assert "Of the whole trace Residual stream of layer 1 at “<i>red”, a token that the corruption changed" in words


def test_every_picture_has_its_maps() -> None:
    trace = make_trace()
    layout = replace(
        trace.layout,
        boxes=torch.where(trace.layout.boxes.isnan(), trace.layout.boxes, torch.tensor([0.0, 0, 40, 20])),
        image_index=torch.tensor([[0, 1, -1, -1]]),
        tile=torch.tensor([[0, 0, -1, -1]]),
        image_sizes=(((40, 20), (40, 20)),),
    )
    trace.values["probability"][0, 0, 0] = 0.3
    found = trace_view("x", replace(trace, layout=layout), [PICTURE, PICTURE]).maps
    assert [caption for caption, _ in found] == [
        "Residual stream, picture 1 (brightest: 0.25)", "Residual stream, picture 2 (brightest: 0.5)",
    ]  # fmt: skip


def test_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no traces"):
        build_trace_report({}, output=tmp_path / "out")
