"""The concepts command finds, names and measures; its dictionary is one that other commands take."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from sae_lens_multimodal.cli.main import main
from sae_lens_multimodal.concepts.dictionary import ConceptDictionary
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.scenes.concept_truth import caption_rows


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    rows = [
        {"image": row["images"][0], "caption": row["messages"][1]["content"][0]["text"]}
        for row in caption_rows(2**43, 20)
    ]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def arguments(dataset: Path, output: Path, *more: str) -> list[str]:
    place = ["--model", str(model_folder()), "--dataset", str(dataset), "--hook", "blocks.2.hook_resid_post"]
    asked = ["--question", "what is in the picture ?", "--word", "solid", "--dtype", "float32"]
    return ["concepts", *place, *asked, "--output", str(output), *more]


def test_concepts_are_found_and_taken_by_another_command(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found"
    assert main(arguments(dataset, output, "-k", "4", "--words", "3", "--noise")) == 0
    printed = capsys.readouterr().out
    dictionary = ConceptDictionary.load(output / "dictionary")
    assert (dictionary.k, dictionary.word) == (4, "solid")
    assert "states of 'solid' from 20 rows read" in printed
    assert printed.splitlines()[-1] == str((output / "dictionary").resolve())
    measured = json.loads((output / "evaluation.json").read_text())
    assert measured["rows"]["semi_nmf"]["explained_variance"] < 1
    assert set(measured["skipped"]) == {"clip_score", "bert_score"}
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    steer = ["steer", str(model_folder()), str(output / "dictionary"), "--image", str(tmp_path / "picture.png")]
    assert main([*steer, "--prompt", "what is this ?", "--set", "1=9"]) == 0
    assert "concept" not in capsys.readouterr().err


def test_mistakes_cost_one_line(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(dataset, tmp_path / "a", "--held-out", "1.5")) == 1
    assert "--held-out got 1.5" in capsys.readouterr().err.splitlines()[-1]
    assert main(arguments(dataset, tmp_path / "b", "-k", "400")) == 1
    assert "Got k=400" in capsys.readouterr().err.splitlines()[-1]
    assert main(arguments(dataset, tmp_path / "c", "--method", "sae", "-k", "2")) == 1
    assert "give sae=" in capsys.readouterr().err.splitlines()[-1]
