"""Whole runs: every architecture, saving, provenance, seeds, interruption, resuming, and mistakes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAE, TrainingSAE
from safetensors.torch import load_file

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.rows import row_to_prompt
from sae_lens_multimodal.errors import (
    ConfigError,
    DatasetError,
    ModelLoadError,
    SAEMismatchError,
    StoreError,
    UnknownHookError,
)
from sae_lens_multimodal.hooks.saes import check_sae
from sae_lens_multimodal.training.evaluate import evaluate_reconstruction
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner
from sae_lens_multimodal.training.trainer import MultimodalSAETrainer

Rows = list[dict[str, Any]]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.1, "k": None},
    "topk": {},
    "batchtopk": {},
    "jumprelu": {"l0_coefficient": 0.1, "k": None},
    "gated": {"l1_coefficient": 0.1, "k": None},
    "matryoshka_batchtopk": {"matryoshka_widths": [16, 64]},
}


def sae_settings(architecture: str) -> dict[str, Any]:
    return {"architecture": architecture, **ARCHITECTURES[architecture]}


def run(model: VisionLanguageModel, config: Any, rows: Any) -> tuple[MultimodalSAETrainingRunner, SAE[Any]]:
    runner = MultimodalSAETrainingRunner(config, override_dataset=rows, override_model=model)
    return runner, runner.run()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_and_is_saved_as_a_plain_sae(
    model: VisionLanguageModel, make_config: Any, rows: Rows, architecture: str
) -> None:
    runner, sae = run(model, make_config(sae=sae_settings(architecture)), rows)
    loaded = SAE.load_from_disk(runner.cfg.output_path)
    x = torch.randn(20, model.d_model, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert torch.equal(loaded(x), sae(x))
    assert loaded.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert loaded.cfg.metadata.training_architecture == architecture
    for modality in ("image", "text"):
        assert runner.metrics[modality]["n_tokens"] > 0
        assert runner.metrics[modality]["explained_variance"] < 1


def test_provenance_is_in_the_metadata(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    runner, _ = run(model, make_config(seed=7), rows)
    folder = Path(runner.cfg.output_path)
    origin = SAE.load_from_disk(folder).cfg.metadata.sae_lens_multimodal
    assert origin["token_shares"] == {"image": 0.5, "text": 0.5}
    assert origin["tokens_seen"] == {"image": 128, "text": 128}
    assert origin["versions"]["sae-lens"]
    assert origin["dataset_path"] == "given in memory as list"
    assert origin["seed"] == 7
    assert origin["evaluated_on"] == "held-out prompts"
    assert origin["metrics"] == runner.metrics
    assert json.loads((folder / "manifest.json").read_text())["kind"] == "sae"
    assert load_file(folder / "sparsity.safetensors")["sparsity"].shape == (64,)


@pytest.mark.parametrize("given", ["a name of my own", ""])
def test_an_sae_of_a_given_model_names_that_model(
    model: VisionLanguageModel, make_config: Any, rows: Rows, given: str
) -> None:
    _, sae = run(model, make_config(model_name=given, n_eval_batches=0, output_path=None), rows)
    assert sae.cfg.metadata.model_name == model.name
    assert check_sae(model, sae) == "blocks.1.hook_resid_post"


def test_training_learns(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    changes = {"training_tokens": 64 * 60, "lr": 1e-2, "n_batches_in_buffer": 8, "sae": {"k": 32, "d_sae": 128}}
    runner, _ = run(model, make_config(**changes), rows)
    untrained = MultimodalSAETrainingRunner(make_config(**changes, overwrite=True), rows, model)
    held_out = list(untrained.activations_store.source.evaluation(4))
    before = evaluate_reconstruction(model, untrained.sae, held_out, hook_name="blocks.1.hook_resid_post")
    for modality in ("image", "text"):
        # 0 is what the mean of the modality would reach.
        assert before[modality]["explained_variance"] < 0
        assert runner.metrics[modality]["explained_variance"] > 0.1


def test_a_short_batchtopk_run_is_saved_with_about_k_features_a_token(
    model: VisionLanguageModel, make_config: Any, rows: Rows
) -> None:
    changes = {"sae": {"architecture": "batchtopk"}, "training_tokens": 64 * 40}
    runner, sae = run(model, make_config(**changes), rows)
    # measured on further batches as training drew them; SAE-Lens's running mean would let 20 and more fire
    tokens = torch.cat([next(runner.activations_store) for _ in range(30)])
    assert sae.encode(tokens).bool().sum(-1).float().mean().item() == pytest.approx(4, abs=1)


def test_two_runs_of_one_seed_give_equal_weights(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path
) -> None:
    saes = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        torch.rand(number)
        saes.append(run(model, make_config(seed=seed, output_path=str(tmp_path / str(number))), rows)[1])
    first, again, other = (sae.state_dict() for sae in saes)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["W_dec"], other["W_dec"])


def test_the_callers_random_state_is_left_alone(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    before = torch.get_rng_state()
    run(model, make_config(), rows)
    assert torch.equal(torch.get_rng_state(), before)


def test_prefetching_gives_the_same_sae(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path
) -> None:
    runner, plain = run(model, make_config(), rows)
    ahead, fetched = run(model, make_config(prefetch_llm_batches=2, output_path=str(tmp_path / "b")), rows)
    assert torch.equal(plain.W_dec, fetched.W_dec)
    assert ahead.metrics == runner.metrics


@pytest.mark.parametrize("normalisation", ["expected_average_only_in", "covariance_whitening"])
def test_normalisation_is_folded_into_what_is_saved(
    model: VisionLanguageModel, make_config: Any, rows: Rows, normalisation: str
) -> None:
    config = make_config(
        sae={"architecture": "standard", "normalize_activations": normalisation, "k": None},
        n_batches_for_norm_estimate=4,
    )
    _, sae = run(model, config, rows)
    assert sae.cfg.normalize_activations == "none"


def test_the_settings_given_are_not_changed(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    config = make_config(hook_name="blocks.1.hook_out")
    before = config.to_dict()
    runner, _ = run(model, config, rows)
    assert config.to_dict() == before
    assert (runner.cfg.hook_name, runner.cfg.sae.d_in) == ("blocks.1.hook_resid_post", model.d_model)


def test_the_progress_bar_shows_both_modalities(
    model: VisionLanguageModel, make_config: Any, rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model, make_config(progress=True), rows)
    shown = capsys.readouterr()
    assert "explained variance: image" in shown.err
    assert ", text " in shown.err
    assert shown.out == ""


def test_what_is_logged_names_the_modalities(
    model: VisionLanguageModel, make_config: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, Any] = {}
    artifacts = []
    monkeypatch.setattr("wandb.init", lambda **_: None)
    monkeypatch.setattr("wandb.finish", lambda: None)
    monkeypatch.setattr("wandb.log", lambda values, step: logged.update(values))
    monkeypatch.setattr("wandb.log_artifact", lambda artifact, **_: artifacts.append(artifact.type))
    often = {"log_to_wandb": True, "wandb_log_frequency": 1, "eval_every_n_wandb_logs": 2}
    run(model, make_config(logger=often), rows)
    for modality in ("image", "text"):
        assert logged[f"metrics/explained_variance_{modality}"] < 1
        assert logged[f"metrics/l0_{modality}"] == 4
        assert logged[f"evaluation/n_tokens_{modality}"] > 0
    assert artifacts == ["model", "log_feature_sparsity"]


# ---- stopping and going on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_from_which_a_run_goes_on(
    model: VisionLanguageModel,
    make_config: Any,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    step = MultimodalSAETrainer.step

    def step_and_signal(self: MultimodalSAETrainer, batch: torch.Tensor) -> Any:
        output = step(self, batch)
        if self.n_training_samples == 128:
            os.kill(os.getpid(), number)
        return output

    config = make_config(checkpoint_path=str(tmp_path / "checkpoints"))
    before = signal.getsignal(number)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="after 128 tokens; go on with") as at:
        patched.setattr(MultimodalSAETrainer, "step", step_and_signal)
        run(model, config, rows)
    assert signal.getsignal(number) is before
    checkpoint = str(at.value).split("resume_from_checkpoint=")[1]
    assert not Path(config.output_path).exists()

    resumed, _ = run(model, make_config(resume_from_checkpoint=checkpoint), rows)
    origin = SAE.load_from_disk(resumed.cfg.output_path).cfg.metadata.sae_lens_multimodal
    assert origin["tokens_seen"] == {"image": 128, "text": 128}
    first = json.loads((Path(checkpoint) / "multimodal_state.json").read_text())["counts"]
    assert first["tokens_read"]["text"] >= 64
    # What was read before the stop counts, and what was read after it.
    assert all(origin["tokens_read"][name] >= read + 64 for name, read in first["tokens_read"].items())
    assert origin["tokens_dropped"] >= first["tokens_dropped"]


def test_without_a_checkpoint_path_the_message_says_that_nothing_is_saved(
    model: VisionLanguageModel, make_config: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MultimodalSAETrainer, "fit", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match="nothing is saved, as checkpoint_path is not set"):
        run(model, make_config(), rows)


def test_a_checkpoint_of_another_run_is_refused(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path
) -> None:
    config = make_config(checkpoint_path=str(tmp_path / "checkpoints"), save_final_checkpoint=True)
    run(model, config, rows)
    checkpoint = str(Path(config.checkpoint_path) / "final_256")
    changes = {"resume_from_checkpoint": checkpoint, "output_path": None}
    with pytest.raises(StoreError, match=r"trained with hook_name='blocks.1.hook_resid_post', this run has 'blocks.2"):
        run(model, make_config(**changes, hook_name="blocks.2.hook_resid_post"), rows)
    with pytest.raises(StoreError, match=r"trained with sae.d_sae=64, this run has 32"):
        run(model, make_config(**changes, sae={"d_sae": 32}), rows)
    with pytest.raises(StoreError, match=r"has no runner_cfg.json; give a folder below checkpoint_path"):
        run(model, make_config(**{**changes, "resume_from_checkpoint": str(tmp_path)}), rows)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_run_is_refused(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    run(model, make_config(), rows)
    with pytest.raises(StoreError, match="holds an earlier run; give another folder, or set overwrite"):
        run(model, make_config(), rows)
    run(model, make_config(overwrite=True), rows)


def test_a_folder_with_other_files_is_refused(
    model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="holds other files"):
        run(model, make_config(output_path=str(tmp_path)), rows)
    with pytest.raises(StoreError, match=r"thesis.txt is a file; give a folder"):
        run(model, make_config(output_path=str(tmp_path / "thesis.txt")), rows)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"sae": {"d_in": 9}}, SAEMismatchError, "sae.d_in is 9, but blocks.1.hook_resid_post of .* wide"),
        ({"hook_name": "blocks.99.hook_resid_post"}, UnknownHookError, "blocks.99"),
        ({"hook_name": ""}, ConfigError, "hook_name is empty"),
        ({"device": "gpu"}, ModelLoadError, "device='gpu'.* does not have"),
        ({"sae": {"architecture": "matryoshka_batchtopk"}}, ConfigError, "matryoshka_widths must not be empty"),
    ],
)
def test_mistakes_are_found_before_training(
    model: VisionLanguageModel,
    make_config: Any,
    rows: Rows,
    changes: dict[str, Any],
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        MultimodalSAETrainingRunner(make_config(**changes), rows, model)


def test_the_vision_tower_has_no_text(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    vision = next(name for name in model.hooks.names() if model.hooks.resolve(name).tower == "vision")
    with pytest.raises(ConfigError, match=r"is in the vision tower.* token_shares asks for text"):
        MultimodalSAETrainingRunner(make_config(hook_name=vision), rows, model)


def test_a_model_must_be_named(make_config: Any, rows: Rows) -> None:
    with pytest.raises(ConfigError, match="model_name is empty"):
        MultimodalSAETrainingRunner(make_config(model_name=""), rows)


def test_a_missing_dataset_is_named(model: VisionLanguageModel, make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nothing.jsonl"):
        MultimodalSAETrainingRunner(make_config(dataset_path=str(tmp_path / "nothing.jsonl")), override_model=model)


def test_an_sae_of_another_kind_cannot_be_trained_on(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    config = make_config(sae={"d_in": model.d_model})
    other = TrainingSAE.from_dict({**config.sae.to_dict(), "d_sae": 32})
    assert isinstance(other, TopKTrainingSAE)
    with pytest.raises(SAEMismatchError, match="has d_sae 32, the settings say 64"):
        MultimodalSAETrainingRunner(config, rows, model, override_sae=other)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_stops_at_max_tokens(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    _, sae = run(model, make_config(n_eval_batches=0), rows)
    report = evaluate_reconstruction(model, sae, map(row_to_prompt, rows), max_tokens=100, batch_size=2)
    assert sum(values["n_tokens"] for values in report.values()) == 100
    assert report["image"]["l0"] == 4


def test_evaluation_refuses_an_sae_of_another_model(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    config = make_config(sae={"d_in": model.d_model + 1}).sae
    with pytest.raises(SAEMismatchError, match="d_in"):
        evaluate_reconstruction(
            model, TrainingSAE.from_dict(config.to_dict()), [], hook_name="blocks.1.hook_resid_post"
        )


def test_a_starved_modality_is_reported(
    model: VisionLanguageModel,
    make_config: Any,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from sae_lens_multimodal.training import runner as runner_module

    monkeypatch.setattr(runner_module, "_STARVED", 2.0)
    run(model, make_config(), rows)
    assert "the saved SAE lets 4.0 features fire on a token of" in caplog.text
