"""The attribute command prints what the public function finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sae_lens_multimodal.cli.main import main
from sae_lens_multimodal.scenes import make_scene, model_folder
from tests.hooks.hook_samples import HOOK, build_sae


@pytest.fixture
def arguments(tmp_path: Path) -> tuple[str, ...]:
    build_sae(d_in=160, metadata={"hook_name": HOOK}).save_model(tmp_path / "sae")
    make_scene(3, size=(64, 64)).image.save(tmp_path / "scene.png")
    model = ("--model", str(model_folder()), "--sae", str(tmp_path / "sae"))
    return ("attribute", *model, "--image", str(tmp_path / "scene.png"), "--prompt", "what is in the picture ?")


def test_effects_are_printed_and_written(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "found.json"
    more = ("--wanted", "red", "--unwanted", "blue", "--top", "3", "--check", "5", "--output", str(output))
    assert main([*arguments, *more]) == 0
    printed = capsys.readouterr().out.splitlines()
    content = json.loads(output.read_text())
    assert printed[0].startswith("logit of 'red' minus logit of 'blue'")
    best = content["features"][0]
    row = printed[printed.index("feature       effect  tokens") + 1].split()
    assert row == [str(best["feature"]), f"{best['effect']:+.4f}", str(best["n_tokens"])]
    assert f"{content['check']['spearman']:.3f}" in printed[-1]
    assert len(content["check"]["nodes"]) == 5


def test_mistakes_cost_one_line(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--wanted", "rouge"]) == 1
    assert "knows not every word" in capsys.readouterr().err.splitlines()[-1]
