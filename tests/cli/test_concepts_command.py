"""The concepts command finds, names and measures; its dictionary is one that other commands take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.cli import concepts
from sae_lens_multimodal.cli.main import main
from sae_lens_multimodal.concepts.decompose import METHODS
from sae_lens_multimodal.concepts.dictionary import ConceptDictionary
from sae_lens_multimodal.concepts.gather import _NAMED_PLACES
from sae_lens_multimodal.concepts.measures import explained_variance
from sae_lens_multimodal.concepts.states import ConceptStates
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
    gathered = ConceptStates.load(output / "states")
    rest = gathered.split(0.8, seed=0)[1]
    assert measured["n_states"] == len(rest)
    expected = explained_variance(rest.states, dictionary.decode(dictionary.encode(rest.states)))
    assert measured["rows"]["semi_nmf"]["explained_variance"] == pytest.approx(expected, abs=1e-4)
    assert set(measured["skipped"]) == {"clip_score", "bert_score", "noise images"}
    assert not list(output.glob("noise*"))
    # The same states do for another seed, batch and way of finding concepts.
    again = arguments(dataset, output, "-k", "3", "--seed", "5", "--batch-size", "4", "--offset", "--no-contrast")
    assert main(again) == 0
    assert ConceptDictionary.load(output / "dictionary").bias is not None
    capsys.readouterr()
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    steer = ["steer", str(model_folder()), str(output / "dictionary"), "--image", str(tmp_path / "picture.png")]
    assert main([*steer, "--prompt", "what is this ?", "--set", "1=9"]) == 0
    assert "concept" not in capsys.readouterr().err


def test_words_are_scored_with_noise_for_the_pictures_of_what_is_held_out(
    dataset: Path, tmp_path: Path, model: VisionLanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=len(model.tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    model.tokenizer.save_pretrained(tmp_path / "bert")
    command = ("-k", "3", "--noise", "--bert", str(tmp_path / "bert"), "--bert-layer", "1")
    assert main(arguments(dataset, tmp_path / "found", *command)) == 0
    noise, own = (ConceptStates.load(tmp_path / "found" / name) for name in ("noise-seed0-0.2", "states"))
    assert set(noise.rows) == set(own.split(0.8, seed=0)[1].rows)
    assert "| semi_nmf, noise images |" in capsys.readouterr().out
    assert main(arguments(dataset, tmp_path / "found", *command, "--seed", "1", "--held-out", "0.3")) == 0


def test_a_dictionary_is_loaded_wherever_an_sae_is(tmp_path: Path) -> None:
    """In a process of its own, as here other tests have imported what registers the architecture."""
    found = ConceptDictionary(torch.eye(3, 8), torch.ones(4, 3), "semi_nmf", hook_name="blocks.2.hook_resid_post")
    found.save(tmp_path)
    script = f"""
import argparse, types
from pathlib import Path
from sae_lens_multimodal.cli.autointerp import _procedure
options = argparse.Namespace(procedure="contrastive", sae=Path({str(tmp_path)!r}))
print(len(_procedure(options, types.SimpleNamespace(d_sae=3, descriptions=None)).neighbours))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "3"


def test_the_choices_are_those_of_the_functions() -> None:
    assert concepts._METHODS == METHODS
    assert concepts._PLACES == _NAMED_PLACES


def test_mistakes_cost_one_line(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(dataset, tmp_path / "a", "--held-out", "1.5")) == 1
    assert "Got held_out=1.5" in capsys.readouterr().err.splitlines()[-1]
    assert main(arguments(dataset, tmp_path / "b", "-k", "400")) == 1
    assert "Got k=400" in capsys.readouterr().err.splitlines()[-1]
    assert main(arguments(dataset, tmp_path / "c", "--method", "sae", "-k", "2")) == 1
    assert "give sae=" in capsys.readouterr().err.splitlines()[-1]
