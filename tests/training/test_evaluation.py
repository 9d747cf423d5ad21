"""The whole evaluation: which rows it takes, what it reports and writes, in Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from sae_lens import SAE

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.cli.main import main
from sae_lens_multimodal.data.rows import row_to_prompt
from sae_lens_multimodal.errors import ConfigError, StoreError
from sae_lens_multimodal.scenes import scene_rows
from sae_lens_multimodal.training.evaluate import evaluate_reconstruction
from sae_lens_multimodal.training.evaluation import Evaluation, evaluate
from sae_lens_multimodal.training.evaluation_report import evaluation_lines, save_evaluation
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner

Trained = tuple[Path, Path, Any]


@pytest.fixture(scope="module")
def trained(model: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run on a Parquet file, its dataset, and its runner."""
    from sae_lens_multimodal.training.config import build_config

    folder = tmp_path_factory.mktemp("run")
    rows = [
        {"images": one["images"], "messages": one["messages"]} for one in scene_rows(5, 40, kinds=("scene", "text"))
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    settings = {
        "sae": {"architecture": "topk", "d_sae": 64, "k": 4},
        "model_name": model.name,
        "hook_name": "blocks.1.hook_resid_post",
        "dataset_path": str(folder / "rows.parquet"),
        "streaming": False,
        "training_tokens": 256,
        "train_batch_size_tokens": 64,
        "n_batches_in_buffer": 4,
        "n_eval_batches": 1,
        "eval_batch_size_prompts": 4,
        "eval_losses": False,
        "checkpoint_path": None,
        "output_path": str(folder / "sae"),
        "device": "cpu",
        "progress": False,
    }
    runner = MultimodalSAETrainingRunner(build_config(settings), override_model=model)
    runner.run()
    return folder / "sae", folder / "rows.parquet", runner


@pytest.fixture(scope="module")
def found(trained: Trained, model: VisionLanguageModel) -> Evaluation:
    return evaluate(trained[0], trained[1], model=model, floor_prompts=6, loss_prompts=2, progress=False)


def test_the_rows_held_out_of_training_are_taken(found: Evaluation, trained: Trained) -> None:
    runner = trained[2]
    assert found.origin["rows"] == "held out of training"
    assert found.origin["n_prompts"] == 4
    for modality, values in runner.metrics.items():
        for name, value in values.items():
            assert found.reconstruction["sae"][modality][name] == pytest.approx(value, rel=1e-5)


def test_floors_stand_beside_with_the_same_sparsity(found: Evaluation) -> None:
    assert set(found.reconstruction) == {"sae", "random", "pca", "neurons"} == set(found.saes)
    for by_modality in found.reconstruction.values():
        assert by_modality["image"]["l0"] == pytest.approx(4, abs=0.2)
    for place in ("image", "text", "both"):
        for name in ("sae", "random", "pca", "neurons"):
            assert found.losses[place][name]["kl"] >= 0
        assert found.losses[place]["zero"]["ce"] != found.losses[place]["ce"]


def test_feature_use_is_that_of_plain_encoding(found: Evaluation, trained: Trained, model: VisionLanguageModel) -> None:
    use = found.features
    l0 = sum(use.density["image"])
    assert l0 == pytest.approx(found.reconstruction["sae"]["image"]["l0"])
    assert sum(use.mean["text"]) == pytest.approx(found.reconstruction["sae"]["text"]["l1"])
    assert sum(use.summary().values()) == 64


def test_another_dataset_is_split_for_the_floors(trained: Trained, model: VisionLanguageModel) -> None:
    rows = list(scene_rows(6, 8, kinds=("scene", "text")))
    found = evaluate(trained[0], rows, model=model, floor_prompts=4, loss_prompts=0, progress=False)
    assert found.origin["n_prompts"] == 4
    assert found.losses == {}
    last = evaluate_reconstruction(model, found.saes["sae"], map(row_to_prompt, rows[4:]))
    for modality, values in last.items():
        for name, value in values.items():
            assert found.reconstruction["sae"][modality][name] == pytest.approx(value, rel=1e-5)
    with pytest.raises(ConfigError, match="give a dataset"):
        evaluate(found.saes["sae"], model=model)


def test_it_is_written_and_read_as_a_table(found: Evaluation, tmp_path: Path) -> None:
    save_evaluation(found, tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert numbers["reconstruction"] == found.reconstruction
    table = pq.read_table(tmp_path / "out" / "features.parquet")
    assert table.num_rows == 64
    assert set(table.column_names) >= {"density_image", "mean_text", "modality_score"}
    save_evaluation(found, tmp_path / "out")  # again, in place
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="other files"):
        save_evaluation(found, tmp_path / "mine")
    lines = evaluation_lines(found)
    assert len({line.count("|") for line in lines[:10] if line.startswith("|")}) == 1
    assert any(line.startswith("| zero ablation") for line in lines)


def test_the_command_prints_the_tables(trained: Trained, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "evaluation"
    arguments = ["evaluate", str(trained[0]), "--loss-prompts", "0", "--floors", "pca", "--scenes", "6"]
    assert main([*arguments, "--output", str(output)]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "| sae " in shown and "| pca " in shown and "| random" not in shown
    assert "| concept |" in shown
    assert json.loads((output / "truth.json").read_text())["sae"]["summary"]["live"] > 0
    assert json.loads((output / "evaluation.json").read_text())["origin"]["rows"] == "held out of training"
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "cannot be read as a SAE" in capsys.readouterr().err


def test_rows_that_were_trained_on_are_called_so(
    trained: Trained, model: VisionLanguageModel, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "sae"
    shutil.copytree(trained[0], folder)
    settings = json.loads((folder / "runner_cfg.json").read_text())
    (folder / "runner_cfg.json").write_text(json.dumps({**settings, "n_eval_batches": 0}))
    found = evaluate(folder, model=model, max_prompts=2, floors=(), loss_prompts=0, progress=False)
    assert found.origin["rows"].startswith("trained on")
    assert "rows that it was trained on" in caplog.text
    assert torch.equal(found.saes["sae"].W_dec, SAE.load_from_disk(trained[0]).W_dec)
