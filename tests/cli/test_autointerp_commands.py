"""The commands that ask judges: calibration, dry runs, budgets, procedures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.calibration import agreement
from sae_lens_multimodal.autointerp.explanation import read_explanations
from sae_lens_multimodal.autointerp.measures import read_measures
from sae_lens_multimodal.autointerp.results import read_scores
from sae_lens_multimodal.cli.main import main
from sae_lens_multimodal.scenes.folder import model_folder
from tests.autointerp.sample import red_sae, write_store

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
    assert found["confidence"] == "probabilities"
    other = {"judge": "one who says no", "answers": {key: not answer for key, answer in found["answers"].items()}}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "calibration.json").write_text(json.dumps(other))
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "calibration.json").write_text("[]")
    assert main((*command, "--compare", str(tmp_path), "--compare", str(tmp_path / "other"))) == 0
    same, opposite = capsys.readouterr().out.splitlines()[-2:]
    assert same.endswith("(Cohen's kappa): 1.00")
    kappa = agreement(found["answers"], other["answers"])
    assert opposite == f"agreement with one who says no (Cohen's kappa): {kappa:.2f}"
    assert kappa is not None and kappa < 0
    assert main((*command, "--compare", str(tmp_path / "third"))) == 1
    assert "is no calibration" in capsys.readouterr().err


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


def test_measure_prints_a_table_and_goes_on_where_it_stopped(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: VisionLanguageModel
) -> None:
    store = tmp_path / "store"
    write_store(store, model)
    explanations = tmp_path / "explanations.jsonl"
    explanations.write_text('{"feature": 0, "text": "red"}\n{"feature": 1, "text": "green"}\n')
    given = ("--explanations", str(explanations), "--items", "2", "--grid", "2x2")
    command = ("measure", str(store), *JUDGE, *given, "--scorers", "simulation,surprisal", "embedding", "intruder")
    assert main((*command, "--dry-run")) == 0
    foretold, nobody = capsys.readouterr().out.splitlines()
    assert nobody == "embedding: no judge is asked."
    assert not (store / "measures").exists()
    assert main((*command, "--max-calls", "3")) == 1
    assert "budget is spent (3 of 3 calls)" in capsys.readouterr().err
    assert main(command) == 0
    *table, folder = capsys.readouterr().out.splitlines()
    assert folder == str(store / "measures")
    assert any(line.startswith("| simulation | image | correlation | 2 of 2 |") for line in table)
    assert "embedding, explanations from image: 2 without numbers: skipped: no CLIP or SigLIP was given" in "\n".join(
        table
    )
    assert "intruder, explanations from image: 2 without numbers: the prompt book cannot ask" in "\n".join(table)
    found = read_measures(store / "measures")
    assert {one.measurer for one in found} == {"simulation", "surprisal", "embedding", "intruder"}
    summary = json.loads((store / "measures" / "summary.json").read_text())
    assert {one["measurer"] for one in summary["numbers"]} == {"simulation", "surprisal"}
    assert summary["without_numbers"][0]["n_features"] == 2
    ledger = json.loads((store / "measures" / "ledger.json").read_text())
    assert ledger["calls"] == int(foretold.split()[0])
    assert main((*command, "--dry-run")) == 0
    assert capsys.readouterr().out.startswith("0 calls")


def test_measure_steers_and_looks_masks_up(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: VisionLanguageModel
) -> None:
    store = write_store(tmp_path / "store", model)
    explanations = tmp_path / "explanations.jsonl"
    explanations.write_text('{"feature": 0, "text": "red"}\n{"feature": 1, "text": "green"}\n')
    lines = []
    for example in (*store.examples(0, "top", "image"), *store.examples(0, "ordinary", "image")):
        Image.new("L", example.images[0].size, 255).save(tmp_path / f"{example.prompt_id}.png")
        lines.append({"explanation": "red", "image": example.image_ids[0], "mask": f"{example.prompt_id}.png"})
    (tmp_path / "masks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    red_sae(model).save_model(tmp_path / "sae")
    steer = ("--model", str(model_folder()), "--sae", str(tmp_path / "sae"), "--max-new-tokens", "3")
    asked = ("--prompt", "a blue square . what is in the picture ?")
    start = ("measure", str(tmp_path / "store"), "--explanations", str(explanations), "--masks", str(tmp_path))
    command = (*start, *JUDGE, "--scorers", "masks", "steering", *steer, *asked)
    assert main((*command, "--dry-run")) == 0
    assert "in at most 6 calls a feature" in capsys.readouterr().out
    assert main(command) == 0
    capsys.readouterr()
    red, green = read_measures(tmp_path / "store" / "measures")[:2]
    assert (red.found.values["pointing"], red.found.values["pointing_floor"]) == (1.0, 1.0)
    assert green.found.note == "no mask is known for this explanation"
    steered = read_measures(tmp_path / "store" / "measures")[2:]
    assert [one.found.values["said_before"] for one in steered] == [0.0, 0.0]
    assert main((*start, "--scorers", "masks")) == 0, "no judge is needed for masks"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--scorers", "guessing"), "--scorers got 'guessing'; expected some of intruder"),
        (("--scorers", "intruder"), "--judge is missing; intruder asks one"),
        ((*JUDGE, "--scorers", "steering"), "steering needs --model, --sae and at least one --prompt"),
        ((*JUDGE, "--scorers", "simulation", "--grid", "4"), "--grid got '4'; expected ROWSxCOLUMNS"),
        (("--scorers", "masks", "--masks", "a", "--segmenter", "b"), "expected one source of masks"),
        (("--scorers", "masks", "--detector", "a"), "give --segmenter, too"),
        (("--scorers", "masks", "--segmenter", "no/where"), "no/where does not load"),
        (("--scorers", "embedding", "--embedding", "no/where"), "expected a CLIP or SigLIP checkpoint"),
        ((*JUDGE, "--scorers", "intruder", "--shown", "1"), "n_shown=1; expected at least 1 and 2"),
    ],
)
def test_measure_says_what_is_missing(
    given: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: VisionLanguageModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a hub that cannot be reached is tried again and again
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_store(tmp_path / "store", model)
    (tmp_path / "explanations.jsonl").write_text('{"feature": 0, "text": "red"}\n')
    command = ("measure", str(tmp_path / "store"), "--explanations", str(tmp_path / "explanations.jsonl"), *given)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
