"""The command line: options with a grammar, and mistakes that cost one line."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import datasets
import pytest

from sae_lens_multimodal.cli.commands import COMMANDS
from sae_lens_multimodal.cli.main import build_parser, main
from sae_lens_multimodal.cli.options import parse_changes, parse_features
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.changes import Ablate, Add, Scale, Set
from sae_lens_multimodal.scenes.folder import model_folder
from sae_lens_multimodal.scenes.rows import scene_rows


def options(**given: list[str]) -> Namespace:
    return Namespace(**{"set": [], "add": [], "scale": [], "ablate": [], **given})


def test_every_command_has_a_function() -> None:
    listed = re.search(r"COMMAND\n(.*?)\n\n", build_parser().format_help(), re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"^    (\w+)", listed[1], re.MULTILINE)) == set(COMMANDS)


def test_features() -> None:
    assert parse_features("3, 17,40-42") == [3, 17, 40, 41, 42]
    assert parse_features(None) is None
    for wrong in ("x", "3,", "1-", "-4"):
        with pytest.raises(ConfigError, match="expected numbers"):
            parse_features(wrong)


def test_changes() -> None:
    found = parse_changes(options(set=["1=8"], add=["2=-0.5"], scale=["3=2"], ablate=["4"]))
    assert found == {1: Set(8.0), 2: Add(-0.5), 3: Scale(2.0), 4: Ablate()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no feature to steer"),
        ({"set": ["1"]}, "FEATURE=NUMBER"),
        ({"ablate": ["x"]}, "number of a feature"),
        ({"set": ["1=2"], "ablate": ["1"]}, "changed twice"),
    ],
)
def test_wrong_changes(given: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_changes(options(**given))


def one_line_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[0]


def test_mistakes_cost_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "missing.yaml" in one_line_error(capsys, "train", str(tmp_path / "missing.yaml"))
    assert "manifest.json" in one_line_error(capsys, "report", str(tmp_path), "--output", str(tmp_path / "out"))
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds no demo" in one_line_error(capsys, "demo", "--output", str(tmp_path))
    steer = ("steer", "--model", str(model_folder()), "--prompt", "?", "--set", "0=1", "--sae")
    assert "not a folder" in one_line_error(capsys, *steer, str(tmp_path / "none"))
    assert "cannot be read as a SAE" in one_line_error(capsys, *steer, str(tmp_path))
    (tmp_path / "cfg.json").write_text('{"architecture": "standard", "d_in": 160, "d_sae": 8}')
    (tmp_path / "sae_weights.safetensors").write_bytes(b"torn")
    assert "cannot be read as a SAE" in one_line_error(capsys, *steer, str(tmp_path))


def test_a_folder_that_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("steer", "--model", str(tmp_path), "--sae", str(tmp_path), "--prompt", "?", "--ablate", "0")
    assert "cannot load" in one_line_error(capsys, *arguments)


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert "nnsight 0.8" in capsys.readouterr().out


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


def test_from_training_to_the_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = list(scene_rows(seed=5, count=24, kinds=("scene", "text")))
    dataset = datasets.Dataset.from_list([{"images": one["images"], "messages": one["messages"]} for one in rows])
    dataset.to_parquet(tmp_path / "rows.parquet")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name: {model_folder()}\nhook_name: blocks.0.hook_resid_post\ndataset_path: {tmp_path}/rows.parquet\n"
        "sae: {architecture: topk, d_sae: 32, k: 4}\ntraining_tokens: 4096\ntrain_batch_size_tokens: 512\n"
        f"n_eval_batches: 0\ncheckpoint_path: null\noutput_path: {tmp_path}/elsewhere\nlr: 0.003\n"
    )
    sae, store, report = tmp_path / "sae", tmp_path / "features", tmp_path / "report"
    model = ("--model", str(model_folder()), "--sae", str(sae))
    judge = ("--judge", str(model_folder()), "--dialect", "scenes")
    commands = (
        ("train", str(config), "--output_path", str(sae)),
        ("harvest", *model, "--dataset", str(tmp_path / "rows.parquet"), "--output", str(store)),
        ("explain", str(store), *judge, "--features", "0-31"),
        ("score", str(store), *judge),
        ("report", str(store), "--output", str(report)),
        ("steer", *model, "--prompt", "is there a red circle ?", "--set", "0=8"),
    )
    for command in commands:
        assert main(command) == 0, capsys.readouterr().err
    assert (report / "index.html").is_file()
    assert "before: " in capsys.readouterr().out
    assert main(("explain", str(store), *judge, "--features", "0-31")) == 0  # again: everything is there already
