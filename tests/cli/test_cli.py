"""The command line: options with a grammar, and mistakes that cost one line."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from sae_lens_multimodal.cli.commands import COMMANDS
from sae_lens_multimodal.cli.main import build_parser, main
from sae_lens_multimodal.cli.options import parse_changes, parse_features
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.changes import Ablate, Add, Scale, Set
from sae_lens_multimodal.scenes.folder import model_folder


def options(**given: list[str]) -> Namespace:
    return Namespace(**{"set": [], "add": [], "scale": [], "ablate": [], **given})


def test_every_command_has_a_function() -> None:
    listed = build_parser().format_help()
    assert [name for name in COMMANDS if f"\n    {name} " not in listed] == []


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


def test_a_folder_that_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("steer", "--model", str(tmp_path), "--sae", str(tmp_path), "--prompt", "?", "--ablate", "0")
    assert "cannot load" in one_line_error(capsys, *arguments)


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert "nnsight 0.8" in capsys.readouterr().out


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out
