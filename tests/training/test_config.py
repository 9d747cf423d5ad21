"""Settings: what is accepted, what is refused with advice, YAML and flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, LanguageModelSAERunnerConfig, StandardTrainingSAEConfig

from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig, build_config
from sae_lens_multimodal.training.config_file import apply_overrides, load_config

YAML = """
sae:
  architecture: batchtopk
  d_in: 128
  d_sae: 1024
  k: 8
model_name: some/model
hook_name: blocks.2.hook_resid_post
dataset_path: some/data
token_shares: {image: 0.75, text: 0.25}
lr: 1e-3
training_tokens: 1e6
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    return path


def make(**changes: Any) -> MultimodalSAERunnerConfig[Any]:
    return MultimodalSAERunnerConfig(sae=StandardTrainingSAEConfig(d_in=8, d_sae=16), **changes)


def test_it_is_a_runner_config_with_fitting_defaults() -> None:
    config = make()
    assert isinstance(config, LanguageModelSAERunnerConfig)
    assert config.logger.log_to_wandb is False
    assert config.is_dataset_tokenized is False
    assert config.token_shares is None


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("is_dataset_tokenized", True, "raw text and image columns"),
        ("hook_head_index", 0, "whole hook"),
        ("seqpos_slice", (5, -5), "token_shares"),
        ("model_class_name", "HookedTransformer", "model_name"),
        ("prepend_bos", True, "chat template"),
        ("sequence_separator_token", "bos", "never joined"),
        ("exclude_special_tokens", False, "always left out"),
        ("compile_llm", True, "compile_sae"),
        ("model_kwargs", {"a": 1}, "model_from_pretrained_kwargs"),
    ],
)
def test_fields_without_meaning_are_refused_with_advice(field: str, value: object, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}=.*{advice}"):
        make(**{field: value})


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({"image": 0.5, "text": 0.4}, "adds up to 0.9"),
        ({"image": 1.5, "text": -0.5}, "must not be negative"),
        ({"picture": 1.0}, r"\['picture'\]; expected shares for \['image', 'text'\]"),
        ({"image": 0.9999, "text": 0.0001}, "'text' less than one token in a batch of 4096"),
    ],
)
def test_shares_that_cannot_work(shares: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(token_shares=shares)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train_batch_size_tokens", 0),
        ("context_size", 0),
        ("n_eval_batches", -1),
        ("training_tokens", 10),
        ("activations_mixing_fraction", 1.0),
        ("lr", 0.0),
        ("image_tokens", "some"),
        ("dtype", "float3"),
        ("prefetch_llm_batches", -1),
    ],
)
def test_values_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match="dtype" if field == "dtype" else field):
        make(**{field: value})


def test_a_yaml_file(yaml_file: Path) -> None:
    config = load_config(yaml_file)
    assert isinstance(config.sae, BatchTopKTrainingSAEConfig)
    assert (config.sae.d_in, config.sae.d_sae, config.sae.k) == (128, 1024, 8)
    # YAML reads 1e-3 and 1e6 as text.
    assert (config.lr, config.training_tokens) == (1e-3, 1_000_000)
    assert config.token_shares == {"image": 0.75, "text": 0.25}


def test_flags_and_assignments_override_single_fields(yaml_file: Path) -> None:
    overrides = ["sae.k=32", "--lr", "1e-4", "--token_shares.image=0.5", "token_shares.text=0.5"]
    config = load_config(yaml_file, [*overrides, "--train-batch-size-tokens=512", "--strict", "--seed", "-1"])
    assert (config.sae.k, config.lr, config.train_batch_size_tokens) == (32, 1e-4, 512)
    assert config.token_shares == {"image": 0.5, "text": 0.5}
    assert (config.strict, config.seed) == (True, -1)


def test_overrides_leave_the_given_mapping_alone() -> None:
    content = {"sae": {"k": 8}}
    apply_overrides(content, ["sae.k=9"])
    assert content == {"sae": {"k": 8}}


def test_to_dict_and_back() -> None:
    config = make(token_shares={"image": 0.5, "text": 0.5}, image_tokens="base")
    again = MultimodalSAERunnerConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.checkpoint_path == config.checkpoint_path


def test_types_of_torch_are_written_as_text() -> None:
    config = make(model_from_pretrained_kwargs={"dtype": torch.bfloat16, "attn_implementation": "sdpa"})
    written = json.loads(json.dumps(config.to_dict()))
    assert written["model_from_pretrained_kwargs"] == {"dtype": "bfloat16", "attn_implementation": "sdpa"}


def test_the_width_may_be_left_to_the_hook(yaml_file: Path) -> None:
    yaml_file.write_text(YAML.replace("  d_in: 128\n", ""))
    assert load_config(yaml_file).sae.d_in == 0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainning_tokens=5", "trainning_tokens is not a setting .* did you mean training_tokens"),
        ("sae.kk=5", r"sae.kk is not a setting .* did you mean sae.k"),
        ("logger.wandb_projekt=x", "did you mean logger.wandb_project"),
        ("sae.architecture=topkk", "sae.architecture is 'topkk'; expected one of: .*batchtopk"),
        ("lr=fast", "lr is 'fast'; expected float"),
        ("training_tokens=1.5", "training_tokens is 1.5; expected int"),
        ("image_tokens=some", "image_tokens is 'some'; expected one of 'all', 'base', 'tiles'"),
        ("token_shares={image: half}", "image is 'half'; expected float"),
        ("streaming=maybe", "streaming is 'maybe'; expected bool"),
        ("sae=5", "sae is 5; expected fields below 'sae:'"),
        ("lr", "'lr' is not a setting; expected name=value"),
        ("lr=[1", r"lr='\[1' is not a value that YAML can read"),
        ("sae.normalize_activations=sometimes", "sae.normalize_activations is 'sometimes'; expected one of"),
    ],
)
def test_mistakes_are_named(yaml_file: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(yaml_file, [override])


@pytest.mark.parametrize(
    ("content", "says"),
    [("- 1", "holds list"), ("a: [", "not valid YAML at line"), ("lr: 1", "sae is None; expected fields")],
)
def test_files_that_are_no_settings(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        load_config(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.yaml cannot be read"):
        load_config(tmp_path / "nothing.yaml")


def test_a_width_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"sae.d_sae is missing"):
        build_config({"sae": {"architecture": "topk"}})


EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_the_example_files_can_be_loaded(path: Path) -> None:
    assert load_config(path).sae.d_sae > 0
