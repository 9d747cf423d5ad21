"""Several SAEs from one forward pass: each is the one that would have been trained alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training import tokens as tokens_module
from sae_lens_multimodal.training.config import build_config
from sae_lens_multimodal.training.log import read_log
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner
from sae_lens_multimodal.training.several import MultimodalMultiSAETrainingRunner
from sae_lens_multimodal.training.several_config import MultimodalMultiSAERunnerConfig, load_run_config

Rows = list[dict[str, Any]]

SAES: dict[str, dict[str, Any]] = {
    "narrow": {"architecture": "topk", "d_sae": 64, "k": 4},
    "wide": {"architecture": "topk", "d_sae": 128, "k": 8},
    "early": {"architecture": "batchtopk", "d_sae": 64, "k": 4},
}
HOOKS = {
    "narrow": "blocks.1.hook_resid_post",
    "wide": "blocks.1.hook_resid_post",
    "early": "blocks.0.hook_mlp_out",
}


@pytest.fixture
def common(model: VisionLanguageModel, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name": model.name,
        "token_shares": {"image": 0.5, "text": 0.5},
        "train_batch_size_tokens": 64,
        "training_tokens": 64 * 8,
        "n_batches_in_buffer": 4,
        "store_batch_size_prompts": 4,
        "n_eval_batches": 1,
        "lr": 1e-3,
        "device": "cpu",
        "output_path": str(tmp_path / "saes"),
        "checkpoint_path": None,
        "progress": False,
        "n_data_workers": 0,
    }


def several(common: dict[str, Any], **changes: Any) -> MultimodalMultiSAERunnerConfig:
    return MultimodalMultiSAERunnerConfig.from_dict({"saes": SAES, "hook_names": HOOKS, **common, **changes})


def test_each_is_the_sae_that_is_trained_alone(
    model: VisionLanguageModel, common: dict[str, Any], rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[str]] = []
    read = tokens_module.read_activations
    monkeypatch.setattr(
        tokens_module,
        "read_activations",
        lambda *given: passes.append(given[2]) or read(*given),  # type: ignore[func-returns-value]
    )
    runner = MultimodalMultiSAETrainingRunner(several(common, n_eval_batches=0), rows, model)
    together = runner.run()
    assert all(sorted(names) == ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"] for names in passes)
    for name in SAES:
        alone = build_config(
            {
                **common,
                "sae": SAES[name],
                "hook_name": HOOKS[name],
                "output_path": str(tmp_path / name),
                "n_eval_batches": 0,
            }
        )
        one = MultimodalSAETrainingRunner(alone, rows, model).run()
        state, other = one.state_dict(), together[name].state_dict()
        assert set(state) == set(other)
        for key, value in state.items():
            assert torch.equal(value, other[key]), (name, key)


def test_held_out_numbers_are_logged_on_the_way_as_if_each_were_alone(
    model: VisionLanguageModel, common: dict[str, Any], rows: Rows, tmp_path: Path
) -> None:
    often = {"logger": {"log_to_wandb": False, "wandb_log_frequency": 2, "eval_every_n_wandb_logs": 2}}
    MultimodalMultiSAETrainingRunner(several(common, **often), rows, model).run()
    for name in ("narrow", "early"):
        one = {**common, **often, "sae": SAES[name], "hook_name": HOOKS[name], "output_path": str(tmp_path / name)}
        MultimodalSAETrainingRunner(build_config(one), rows, model).run()
        alone = read_log(tmp_path / f"{name}.log.jsonl")
        together = read_log(Path(common["output_path"]) / f"{name}.log.jsonl")
        found = [line for line in alone if any(key.startswith("evaluation/") for key in line)]
        assert [line["step"] for line in found] == [3, 7]
        assert [line for line in together if any(key.startswith("evaluation/") for key in line)] == found


def test_each_is_saved_with_its_own_metrics_and_metadata(
    model: VisionLanguageModel, common: dict[str, Any], rows: Rows
) -> None:
    runner = MultimodalMultiSAETrainingRunner(several(common), rows, model)
    runner.run()
    for name in SAES:
        loaded = SAE.load_from_disk(Path(common["output_path"]) / name)
        assert loaded.cfg.metadata.hook_name == HOOKS[name]
        assert loaded.cfg.d_sae == SAES[name]["d_sae"]
        origin = loaded.cfg.metadata.sae_lens_multimodal
        assert origin["tokens_seen"] == {"image": 256, "text": 256}
        assert origin["tokens_read"]["text"] >= 256
        assert origin["metrics"] == runner.metrics[name]
        assert runner.metrics[name]["image"]["n_tokens"] > 0
    assert runner.metrics["narrow"] != runner.metrics["wide"]


def test_the_vision_tower_and_the_projector_join_in(
    model: VisionLanguageModel, common: dict[str, Any], rows: Rows
) -> None:
    hooks = {
        "narrow": "blocks.1.hook_resid_post",
        "wide": "projector.hook_out",
        "early": "vision.blocks.0.hook_resid_post",
    }
    runner = MultimodalMultiSAETrainingRunner(several(common, hook_names=hooks), rows, model)
    saes = runner.run()
    assert saes["early"].cfg.d_in == model.config.vision_config.hidden_size
    for name in ("wide", "early"):
        origin = SAE.load_from_disk(Path(common["output_path"]) / name).cfg.metadata.sae_lens_multimodal
        assert origin["tokens_seen"] == {"image": 512}
        assert runner.metrics[name]["text"]["n_tokens"] == 0
    narrow = SAE.load_from_disk(Path(common["output_path"]) / "narrow").cfg.metadata.sae_lens_multimodal
    assert narrow["tokens_seen"] == {"image": 256, "text": 256}


def test_the_vision_tower_alone(model: VisionLanguageModel, common: dict[str, Any], rows: Rows) -> None:
    settings = {"sae": SAES["narrow"], "hook_name": "vision.blocks.0.hook_resid_post", "token_shares": None}
    runner = MultimodalSAETrainingRunner(build_config({**common, **settings}), rows, model)
    sae = runner.run()
    assert sae.cfg.d_in == model.config.vision_config.hidden_size
    assert runner.metrics["image"]["n_tokens"] > 0


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_interrupted_run_goes_on_to_the_same_saes(
    model: VisionLanguageModel, common: dict[str, Any], rows: Rows, tmp_path: Path, prefetch: int
) -> None:
    hooks = {**HOOKS, "early": "projector.hook_out"}
    settings = {"checkpoint_path": str(tmp_path / "checkpoints"), "n_eval_batches": 0, "prefetch_llm_batches": prefetch}
    whole = MultimodalMultiSAETrainingRunner(several(common, hook_names=hooks, n_eval_batches=0), rows, model).run()
    config = several(common, hook_names=hooks, output_path=str(tmp_path / "cut"), **settings)
    runner = MultimodalMultiSAETrainingRunner(config, rows, model)
    step = runner._build_trainer

    def stop_after_three(provider: Any) -> Any:
        trainer = step(provider)
        train = trainer._train_one_batch

        def one_batch() -> None:
            train()
            trainer.stop_requested = trainer.n_training_steps == 3

        trainer._train_one_batch = one_batch
        return trainer

    runner._build_trainer = stop_after_three  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt, match="go on with resume_from_checkpoint=") as stopped:
        runner.run()
    folder = str(stopped.value).rsplit("=", 1)[1]
    again = several(
        common, hook_names=hooks, output_path=str(tmp_path / "again"), resume_from_checkpoint=folder, **settings
    )
    resumed = MultimodalMultiSAETrainingRunner(again, rows, model).run()
    for name, sae in whole.items():
        assert torch.equal(sae.W_dec, resumed[name].W_dec)
        assert torch.equal(sae.W_enc, resumed[name].W_enc)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_round_trip_and_come_from_yaml(common: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    config = several(common)
    assert MultimodalMultiSAERunnerConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"saes": SAES, "hook_names": HOOKS, **common}))
    read = load_run_config(path, ["--saes.wide.k", "16", "lr=1e-2"])
    assert isinstance(read, MultimodalMultiSAERunnerConfig)
    assert read.parts["wide"].sae.k == 16
    assert {part.lr for part in read.parts.values()} == {1e-2}
    assert read.parts["early"].output_path == str(tmp_path / "saes" / "early")
    path.write_text(yaml.safe_dump({"sae": SAES["wide"], "hook_name": "x", **common}))
    assert not isinstance(load_run_config(path), MultimodalMultiSAERunnerConfig)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"saes": {}}, "saes is empty"),
        ({"saes": {"../x": SAES["wide"]}}, "makes no folder"),
        ({"hook_names": {"narrow": "x"}}, r"hook_names has \['narrow'\], saes has"),
        ({"sae": SAES["wide"]}, "Got saes and sae"),
        ({"hook_name": "x"}, "Got saes and hook_name"),
        ({"saes": {"a": {"architecture": "topk"}}, "hook_names": "x"}, "sae.d_sae is missing"),
        ({"from_pretrained_path": "x"}, "from_pretrained_path names one SAE"),
        ({"trianing_tokens": 3}, "did you mean training_tokens"),
    ],
)
def test_mistakes_are_named(common: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        several(common, **changes)
