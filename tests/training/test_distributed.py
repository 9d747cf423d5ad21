"""Two processes train the SAE that one would train on the tokens of both; no row is read by both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

from sae_lens_multimodal.errors import ConfigError, StoreError
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.training import runner as runner_module
from sae_lens_multimodal.training.config import build_config
from sae_lens_multimodal.training.distributed import Processes, config_of_process, own_rows, store_config
from sae_lens_multimodal.training.prompts import PromptSource

SAES: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "d_sae": 64, "k": 4},
    "batchtopk": {
        "architecture": "batchtopk",
        "d_sae": 64,
        "k": 4,
        "normalize_activations": "expected_average_only_in",
    },
}
BATCH, STEPS = 64, 6


def settings(sae: dict[str, Any]) -> dict[str, Any]:
    return {
        "sae": sae,
        "model_name": str(model_folder()),
        "hook_name": "blocks.0.hook_resid_post",
        "token_shares": {"image": 0.5, "text": 0.5},
        "train_batch_size_tokens": BATCH,
        "training_tokens": BATCH * STEPS,
        "n_batches_in_buffer": 2,
        "store_batch_size_prompts": 2,
        "n_eval_batches": 1,
        "n_batches_for_norm_estimate": 2,
        "dead_feature_window": 2,
        "lr": 1e-3,
        "device": "cpu",
        "checkpoint_path": None,
        "n_data_workers": 0,
        "progress": False,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes, started by torchrun, leave behind."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "settings.json").write_text(json.dumps({name: settings(sae) for name, sae in SAES.items()}))
    script = Path(__file__).with_name("two_processes.py")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), str(folder)]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def batches_of_both(folder: Path, name: str) -> Iterator[torch.Tensor]:
    first, second = (load_file(folder / f"{name}-batches-{rank}") for rank in (0, 1))
    for key in sorted(key for key in first if key.startswith("activations")):
        yield torch.cat([first[key], second[key]])


@pytest.mark.parametrize("name", SAES)
def test_two_processes_train_as_one_on_the_same_tokens(trained: Path, name: str) -> None:
    cfg = build_config({**settings({**SAES[name], "d_in": 128}), "output_path": None})
    cfg.sae.d_in = load_file(trained / f"{name}-start-0")["W_enc"].shape[0]
    sae: TrainingSAE[Any] = TrainingSAE.from_dict(cfg.sae.to_dict())
    start = load_file(trained / f"{name}-start-0")
    sae.load_state_dict(start)
    # SAE-Lens's own trainer, in one process, on the joined batches
    one = SAETrainer(cfg.to_sae_trainer_config(), sae, batches_of_both(trained, name)).fit()
    ends = [load_file(trained / f"{name}-end-{rank}") for rank in (0, 1)]
    for key, value in one.state_dict().items():
        assert torch.equal(ends[0][key], ends[1][key]), key
        assert torch.allclose(value, ends[0][key], rtol=1e-4, atol=1e-5), (key, (value - ends[0][key]).abs().max())
    assert not torch.allclose(start["W_dec"], ends[0]["W_dec"], atol=1e-3)


@pytest.mark.parametrize("name", SAES)
def test_every_process_has_its_own_rows_and_exact_shares(trained: Path, name: str) -> None:
    first, second = (set(json.loads((trained / f"{name}-rows-{rank}.json").read_text())) for rank in (0, 1))
    assert not first & second
    assert abs(len(first) - len(second)) <= 1
    for rank in (0, 1):
        batches = load_file(trained / f"{name}-batches-{rank}")
        for key in (key for key in batches if key.startswith("modality")):
            assert torch.bincount(batches[key].long()).max() == BATCH // 4
            assert len(batches[key]) == BATCH // 2


@pytest.mark.parametrize("name", SAES)
def test_the_first_process_saves_and_counts_for_all(trained: Path, name: str) -> None:
    sae = SAE.load_from_disk(trained / name)
    assert sae.cfg.metadata.sae_lens_multimodal["tokens_seen"] == {"image": 192, "text": 192}
    assert sae.cfg.metadata.sae_lens_multimodal["metrics"]["image"]["n_tokens"] > 0


@pytest.mark.parametrize("name", SAES)
def test_from_a_checkpoint_both_go_on_to_the_same_weights(trained: Path, name: str) -> None:
    for rank in (0, 1):
        end, resumed = (load_file(trained / f"{name}-{what}-{rank}") for what in ("end", "resumed"))
        assert end.keys() == resumed.keys()
        for key, value in end.items():
            assert torch.equal(value, resumed[key]), key


def test_as_many_processes_have_to_go_on_as_there_were(trained: Path) -> None:
    saved = [path.parent for path in (trained / "checkpoints").glob("*/*/runner_cfg.json")]
    written = {json.loads((one / "runner_cfg.json").read_text())["sae"]["architecture"]: one for one in saved}
    alone = {**settings(SAES["topk"]), "output_path": None, "resume_from_checkpoint": str(written["topk"])}
    rows = [{"text": "what is this ?"}] * 24
    runner = runner_module.MultimodalSAETrainingRunner(build_config(alone), rows)
    with pytest.raises(StoreError, match="by 2 processes together, this run has 1"):
        runner.run()


# ---- rows and settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "dataset", "stream"])
def test_rows_are_shared_out_once_each(kind: str) -> None:
    rows = [{"text": str(index)} for index in range(21)]
    given: Any = rows if kind == "list" else datasets.Dataset.from_list(rows)
    source = PromptSource.split(given.to_iterable_dataset() if kind == "stream" else given, held_out=2)
    parts = [[row["text"] for row in own_rows(source, Processes(rank, 3)).training_rows] for rank in range(3)]
    held = {row["text"] for row in source.held_out_rows}
    assert sorted([*chain(*parts), *held], key=int) == [row["text"] for row in rows]
    assert own_rows(source, Processes()) is source


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train_batch_size_tokens": 65}, "is 65, which 2 processes cannot share equally"),
        ({"use_cached_activations": True, "cached_activations_path": "x"}, "is for one process"),
    ],
)
def test_settings_for_one_process_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_of_process(build_config({**settings(SAES["topk"]), **changes}), Processes(0, 2))


def test_only_the_first_process_reports() -> None:
    cfg = build_config({**settings(SAES["topk"]), "progress": True, "output_path": "x"})
    own = config_of_process(cfg, Processes(1, 2))
    assert (own.progress, own.output_path, own.logger.log_to_wandb) == (False, None, False)
    assert config_of_process(cfg, Processes(0, 2)).output_path == "x"
    assert config_of_process(cfg, Processes()) is cfg
    assert store_config(cfg, Processes(1, 2)).train_batch_size_tokens == BATCH // 2


def test_a_share_must_reach_every_process() -> None:
    cfg = build_config({**settings(SAES["topk"]), "token_shares": {"image": 1 / 64, "text": 63 / 64}})
    with pytest.raises(ConfigError, match="less than one token"):
        store_config(cfg, Processes(0, 2))


def test_a_device_map_is_handed_to_transformers(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    load, given = runner_module.load_model, {}
    monkeypatch.setattr(runner_module, "load_model", lambda name, **more: given.update(more) or load(name, **more))
    placed = {"model_from_pretrained_kwargs": {"device_map": {"": "cpu"}}, "output_path": None}
    runner = runner_module.MultimodalSAETrainingRunner(build_config({**settings(SAES["topk"]), **placed}), rows)
    assert given == {"device_map": {"": "cpu"}}
    assert runner.run().cfg.d_sae == 64
