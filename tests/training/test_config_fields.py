"""Every setting of SAE-Lens works, has a stated meaning for prompts with pictures, or is refused with advice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training import runner as runner_module
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig, build_config
from sae_lens_multimodal.training.config_file import load_config
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner

Rows = list[dict[str, Any]]

NORMALISED = {"sae": {"normalize_activations": "expected_average_only_in"}}
COSINE = {"lr_scheduler_name": "cosineannealing"}
RESTARTS = {"lr_scheduler_name": "cosineannealingwarmrestarts"}

CHANGES_THE_WEIGHTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sae": ({}, {"sae": {"k": 2}}),
    "hook_name": ({}, {"hook_name": "blocks.0.hook_resid_post"}),
    "context_size": ({}, {"context_size": 60, "token_shares": None}),
    "n_batches_in_buffer": ({}, {"n_batches_in_buffer": 2}),
    "training_tokens": ({}, {"training_tokens": 64 * 2}),
    "store_batch_size_prompts": ({"n_eval_batches": 0}, {"n_eval_batches": 0, "store_batch_size_prompts": 3}),
    "activations_mixing_fraction": (
        {"n_batches_in_buffer": 2, "activations_mixing_fraction": 0.5},
        {"n_batches_in_buffer": 2, "activations_mixing_fraction": 0.0},
    ),
    "seed": ({}, {"seed": 1}),
    "dtype": ({}, {"dtype": "bfloat16"}),
    "autocast": ({}, {"autocast": True}),
    "autocast_lm": ({}, {"autocast_lm": True}),
    "train_batch_size_tokens": ({}, {"train_batch_size_tokens": 32}),
    "adam_beta1": ({}, {"adam_beta1": 0.5}),
    "adam_beta2": ({}, {"adam_beta2": 0.5}),
    "lr": ({}, {"lr": 5e-3}),
    "lr_scheduler_name": ({}, COSINE),
    "lr_warm_up_steps": ({}, {"lr_warm_up_steps": 2}),
    "lr_decay_steps": ({}, {"lr_decay_steps": 2}),
    "lr_end": (COSINE, {**COSINE, "lr_end": 9e-4}),
    "n_restart_cycles": (RESTARTS, {**RESTARTS, "n_restart_cycles": 3}),
    "dead_feature_window": ({"dead_feature_window": 1000}, {"dead_feature_window": 0}),
    "n_batches_for_norm_estimate": (
        {**NORMALISED, "n_batches_for_norm_estimate": 1},
        {**NORMALISED, "n_batches_for_norm_estimate": 3},
    ),
    "n_eval_batches": ({}, {"n_eval_batches": 0}),
    "eval_batch_size_prompts": ({}, {"eval_batch_size_prompts": 2}),
    "exclude_special_tokens": ({}, {"exclude_special_tokens": list(range(30, 90))}),
}
"""Two settings each that must give other weights: the field alone is different."""

REFUSED: dict[str, Any] = {
    "model_class_name": "HookedTransformer",
    "hook_eval": "blocks.0.hook_resid_post",
    "hook_head_index": 1,
    "dataset_trust_remote_code": True,
    "is_dataset_tokenized": True,
    "seqpos_slice": [1, 5],
    "disable_concat_sequences": True,
    "sequence_separator_token": "bos",
    "prepend_bos": True,
    "compile_llm": True,
    "llm_compilation_mode": "default",
    "dead_feature_threshold": 0.5,
    "model_kwargs": {"output_attentions": True},
}

SHOWN_BELOW = {
    "from_pretrained_path",
    "model_name",
    "model_from_pretrained_kwargs",
    "llm_device",
    "device",
    "act_store_device",
    "dataset_path",
    "streaming",
    "feature_sampling_window",
    "compile_sae",
    "sae_compilation_mode",
    "use_chat_formatting",
    "verbose",
    "sae_lens_version",
    "sae_lens_training_version",
}

SHOWN_ELSEWHERE = {
    "test_cache.py": {"use_cached_activations", "cached_activations_path"},
    "test_resume.py": {
        "n_checkpoints",
        "checkpoint_path",
        "save_final_checkpoint",
        "resume_from_checkpoint",
        "output_path",
        "prefetch_llm_batches",
    },
    "test_runner.py": {"logger"},
}


def test_no_field_is_forgotten() -> None:
    known = {entry.name for entry in dataclasses.fields(LanguageModelSAERunnerConfig)}
    shown = [set(CHANGES_THE_WEIGHTS), set(REFUSED), SHOWN_BELOW, *SHOWN_ELSEWHERE.values()]
    assert set().union(*shown) == known
    assert sum(map(len, shown)) == len(known)
    for file, names in SHOWN_ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text()
        assert all(name in text for name in names), file


@pytest.mark.parametrize("field", REFUSED)
def test_it_is_refused_with_advice(make_config: Any, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}=.* cannot be used for a vision-language model: .*\.$"):
        make_config(**{field: REFUSED[field]})


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    """Weights by settings: several fields share what they are compared with."""
    return {}


@pytest.mark.parametrize("field", CHANGES_THE_WEIGHTS)
def test_it_changes_the_weights(
    model: VisionLanguageModel, make_config: Any, rows: Rows, trained: dict[str, torch.Tensor], field: str
) -> None:
    def train(changes: dict[str, Any]) -> torch.Tensor:
        key = json.dumps(changes, sort_keys=True)
        if key not in trained:
            settings = {"training_tokens": 64 * 4, "n_batches_in_buffer": 1, "output_path": None, **changes}
            sae = MultimodalSAETrainingRunner(make_config(**settings), rows, model).run()
            trained[key] = sae.W_dec.detach().clone()
        return trained[key]

    one, other = CHANGES_THE_WEIGHTS[field]
    assert not torch.equal(train(one), train(other))


def test_the_model_is_loaded_as_asked(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(runner_module, "load_model", lambda name, **settings: asked.append((name, settings)))
    loading = {"dtype": "bfloat16", "attn_implementation": "sdpa"}
    runner_module.load_run_model(make_config(model_name="m", llm_device="cpu:0", model_from_pretrained_kwargs=loading))
    runner_module.load_run_model(make_config(model_name="n", device="cpu"))
    assert asked == [("m", {**loading, "device": "cpu:0"}), ("n", {"device": "cpu"})]


def test_activations_wait_and_are_trained_on_where_asked(
    model: VisionLanguageModel, make_config: Any, rows: Rows
) -> None:
    config = make_config(act_store_device="cpu:0", device="cpu", output_path=None)
    runner = MultimodalSAETrainingRunner(config, rows, model)
    assert runner.activations_store.device == torch.device("cpu:0")
    assert runner.sae.device == torch.device("cpu")
    assert make_config(act_store_device="with_model", llm_device="cpu:0").act_store_device == "cpu:0"


@pytest.mark.parametrize("streaming", [True, False])
def test_the_dataset_is_opened_as_asked(
    model: VisionLanguageModel, make_config: Any, tmp_path: Path, streaming: bool
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a red circle"}\n' * 20)
    config = make_config(dataset_path=str(file), streaming=streaming, token_shares={"text": 1.0}, n_eval_batches=0)
    store = MultimodalSAETrainingRunner(config, override_model=model).activations_store
    # Of a stream the length is not known.
    assert store.n_rows == (None if streaming else 20)


def test_a_saved_sae_is_trained_on(model: VisionLanguageModel, make_config: Any, rows: Rows, tmp_path: Path) -> None:
    first = MultimodalSAETrainingRunner(make_config(output_path=None), rows, model)
    first.run()
    first.sae.save_model(tmp_path / "start")
    config = make_config(from_pretrained_path=str(tmp_path / "start"), output_path=None)
    again = MultimodalSAETrainingRunner(config, rows, model)
    assert torch.equal(again.sae.W_dec, first.sae.W_dec)
    again.run()
    assert not torch.equal(again.sae.W_dec, first.sae.W_dec)


def test_sparsity_is_counted_over_its_window(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    counted = []
    for window in (3, 2000):
        runner = MultimodalSAETrainingRunner(make_config(feature_sampling_window=window, output_path=None), rows, model)
        seen: list[Any] = []
        runner._log_result = lambda trainer, seen=seen: seen.append(trainer)  # type: ignore[method-assign]
        runner.run()
        counted.append(seen[0].n_frac_active_samples)
    assert counted == [64, 256]  # one step since the third, and all four


def test_the_sae_is_compiled_as_asked(
    model: VisionLanguageModel, make_config: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def compiled(function: Any, *, mode: str | None, backend: str) -> Any:
        modes.append((mode, backend))
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    config = make_config(compile_sae=True, sae_compilation_mode="max-autotune", output_path=None)
    MultimodalSAETrainingRunner(config, rows, model).run()
    assert modes == [("max-autotune", "inductor")]


def test_chat_formatting_is_what_is_done_anyway(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    first, second = (
        next(
            MultimodalSAETrainingRunner(
                make_config(use_chat_formatting=value, output_path=None), rows, model
            ).activations_store
        )
        for value in (False, True)
    )
    assert torch.equal(first, second)


def test_verbose_and_versions(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="sae_lens"):
        quiet = make_config(verbose=False)
        assert "Total training steps" not in caplog.text
        make_config(verbose=True)
    assert "Total training steps" in caplog.text
    written = quiet.to_dict()
    from sae_lens import __version__

    assert written["sae_lens_version"] == written["sae_lens_training_version"] == __version__


# ---- round trips -----------------------------------------------------------------------------------------------------

UNUSUAL: dict[str, Any] = {
    "token_shares": {"image": 0.25, "text": 0.75},
    "image_tokens": "tiles",
    "max_norm_ratio": 20.0,
    "exclude_special_tokens": [3, 5],
    "prefetch_llm_batches": 2,
    "lr_end": 1e-6,
    "eval_batch_size_prompts": 3,
    "model_from_pretrained_kwargs": {"dtype": "bfloat16", "device_map": {"model": 0}},
    "logger": {"log_to_wandb": True, "wandb_project": "p", "run_name": "r", "wandb_id": "i"},
    "cached_activations_path": "somewhere",
    "resume_from_checkpoint": "latest",
    "checkpoint_path": "checkpoints",
    "act_store_device": "cpu",
    "sae": {"architecture": "matryoshka_batchtopk", "matryoshka_widths": [16, 64], "k": 2.5},
}


def test_settings_come_back_from_a_dict_from_json_from_yaml_and_from_flags(make_config: Any, tmp_path: Path) -> None:
    config = make_config(**UNUSUAL)
    written = config.to_dict()
    for read in (written, json.loads(json.dumps(written)), yaml.safe_load(yaml.safe_dump(written))):
        again = MultimodalSAERunnerConfig.from_dict(read)
        assert again.to_dict() == written
        assert type(again.sae) is type(config.sae)
    (tmp_path / "base.yaml").write_text("sae: {architecture: topk, d_sae: 64}\n")
    flags = []
    for name, value in flat({**written, "checkpoint_path": "checkpoints"}):
        flags += [f"--{name}", json.dumps(value)]
    assert load_config(tmp_path / "base.yaml", flags).to_dict() == written


def flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in content.items():
        if name in ("sae", "logger"):
            found += flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def test_a_recorded_run_is_built_again(make_config: Any) -> None:
    written = make_config(**UNUSUAL).to_dict()
    assert build_config({**written, "checkpoint_path": "checkpoints"}).to_dict() == written
