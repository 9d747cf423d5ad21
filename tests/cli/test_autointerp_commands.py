"""The commands that ask judges: calibration, dry runs, budgets, procedures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.explanation import read_explanations
from sae_lens_multimodal.autointerp.results import read_scores
from sae_lens_multimodal.cli.main import main
from sae_lens_multimodal.scenes.folder import model_folder
from tests.autointerp.sample import write_store

JUDGE = ("--judge", str(model_folder()), "--dialect", "scenes")


def test_calibrate_prints_a_table_and_keeps_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ("calibrate", *JUDGE, "--features", "3", "--regions", "1", "--output", str(tmp_path))
    assert main((*command, "--dry-run")) == 0
    (foretold,) = capsys.readouterr().out.splitlines()
    assert main(command) == 0
    assert "| black (should be at chance) |" in capsys.readouterr().out
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert found["n_features"] == 3
    # one request is one crop of one region with one word; explanations ask the same in both orders of one region
    assert int(foretold.split()[0]) == len(found["answers"]) + 3


def test_explain_and_score_with_procedure_dry_run_and_budget(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: VisionLanguageModel
) -> None:
    store = tmp_path / "store"
    write_store(store, model)
    explain = ("explain", str(store), *JUDGE, "--features", "0-1", "--procedure", "contrastive")
    assert main((*explain, "--dry-run")) == 0
    assert "at most" in capsys.readouterr().out
    assert not (store / "explanations").exists()
    assert main((*explain, "--max-calls", "1")) == 1
    assert "budget is spent (1 of 1 calls)" in capsys.readouterr().err
    assert main(explain) == 0
    assert {one.procedure for one in read_explanations(store / "explanations")} == {"contrastive"}
    score = ("score", str(store), *JUDGE, "--scorers", "detection_crop", "--items", "2")
    assert main((*score, "--dry-run")) == 0
    assert not (store / "scores").exists()
    assert main(score) == 0
    assert {one.scorer for one in read_scores(store / "scores")} == {"detection_crop"}
    capsys.readouterr()
    assert main(("explain", str(store), *JUDGE, "--sae", str(tmp_path))) == 1
    assert "--sae finds hard negatives" in capsys.readouterr().err
