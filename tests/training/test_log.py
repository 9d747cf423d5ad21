"""The local log of a run, and its plot."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.training.log import TrainingLog, charts_of, read_log
from sae_lens_multimodal.training.plot import line_charts, ticks
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner

SVG = "{http://www.w3.org/2000/svg}"


def test_only_finite_numbers_are_written(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "sae")
    log.write({"a": 1, "b": float("nan"), "c": object(), "d": True, "e": 0.5}, step=3, tokens=30)
    log.write({"b": float("inf")}, step=4, tokens=40)
    assert read_log(tmp_path / "sae.log.jsonl") == [{"step": 3, "tokens": 30, "a": 1, "e": 0.5}]


def test_a_resumed_log_drops_what_will_be_logged_again(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "sae")
    for step in range(5):
        log.write({"a": step}, step=step, tokens=step)
    with log.path.open("a") as file:
        file.write('{"step": 5, "tok')  # killed while writing
    again = TrainingLog(tmp_path / "sae", after_step=3)
    again.write({"a": 9}, step=3, tokens=3)
    assert [line["a"] for line in read_log(again.path)] == [0, 1, 2, 9]
    assert read_log(TrainingLog(tmp_path / "sae").path) == []
    with pytest.raises(StoreError, match="expected the log"):
        read_log(tmp_path / "none.jsonl")


def test_points_lie_where_their_values_are() -> None:
    drawn = ElementTree.fromstring(
        line_charts({"<a & b>": {"x": [(0, 1.0), (10, 3.0), (5, float("nan"))], "none": []}})
    )
    (line,) = drawn.iter(f"{SVG}polyline")
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.attrib["points"].split())
    assert x0 < x1 and y0 > y1  # upwards on the page is less
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert "<a & b>" in texts
    assert "none" not in texts
    assert ElementTree.fromstring(line_charts({"empty": {}})).tag == f"{SVG}svg"


def test_ticks_are_round() -> None:
    assert ticks(0, 7) == [0, 2, 4, 6]
    assert ticks(-0.03, 0.021) == [-0.02, 0.0, 0.02] or len(ticks(-0.03, 0.021)) <= 6
    assert ticks(400_000, 800_000)[0] == 400_000


def test_a_run_is_logged_without_wandb(
    model: VisionLanguageModel, make_config: Any, rows: list[dict[str, Any]]
) -> None:
    often = {"log_to_wandb": False, "wandb_log_frequency": 1, "eval_every_n_wandb_logs": 2}
    config = make_config(logger=often, eval_losses=True)
    runner = MultimodalSAETrainingRunner(config, rows, model)
    runner.run()
    path = Path(config.output_path).with_name("sae.log.jsonl")
    lines = read_log(path)
    steps = [line for line in lines if "losses/overall_loss" in line]
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    assert [line["tokens"] for line in steps] == [64, 128, 192, 256]
    assert all("metrics/explained_variance_image" in line for line in steps)
    evaluated = [line for line in lines if "evaluation/explained_variance_text" in line]
    assert [line["step"] for line in evaluated] == [1, 3]
    # the last line is the final evaluation, with the losses that are also in the metadata
    place = runner.losses["both"]
    assert lines[-1]["final/losses/both/sae/ce"] == place["sae"]["ce"]
    assert lines[-1]["final/image/l0"] == runner.metrics["image"]["l0"]
    assert place["sae"]["kl"] >= 0
    assert runner.sae.cfg.metadata.sae_lens_multimodal["losses"] == runner.losses
    assert charts_of(lines)["explained variance"]["text, held out"]
    assert ElementTree.parse(path.with_name("sae.log.svg")).getroot().tag == f"{SVG}svg"
    assert json.loads(path.read_text().splitlines()[0])["step"] == 0
