"""Loading models, and the one sentence that each way of failing gives."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import TransformersModel
from transformers import LlamaConfig, LlamaForCausalLM

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.registry import find_family
from sae_lens_multimodal.errors import ModelLoadError, MultimodalError, UnsupportedModelError
from sae_lens_multimodal.scenes import model_folder
from tests.adapters.adapter_samples import picture, prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random model."""
    path = tmp_path_factory.mktemp("saved")
    module, processor = find_family("llava_next").random_model(seed=1)
    module.to(torch.bfloat16).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def copy_of(folder: Path, tmp_path: Path, *, without: str = "") -> Path:
    target = tmp_path / "copy"
    shutil.copytree(folder, target)
    if without:
        (target / without).unlink()
    return target


def test_it_is_an_nnsight_model(model: VisionLanguageModel) -> None:
    assert isinstance(model, TransformersModel)
    assert model.name == str(model_folder())
    assert model.device == torch.device("cpu")
    assert model.family.model_type == "llava_next"
    assert model.n_layers == model._module.config.text_config.num_hidden_layers
    assert model.d_model == model._module.config.text_config.hidden_size
    assert not model._module.training


def test_the_shipped_model_encodes_and_answers(model: VisionLanguageModel, images: list[Any]) -> None:
    batch = model.encode([prompt(image, "what is this ?") for image in images])
    assert batch.n_rows == len(images)
    assert batch.layout.image_sizes == tuple((image.size,) for image in images)
    assert "EncodedBatch(input_ids=" in repr(batch)
    answers = model.answer([prompt(image, "what is this ?") for image in images[:2]], max_new_tokens=4)
    assert len(answers) == 2


def test_dtypes(folder: Path) -> None:
    assert load_model(folder).dtype == torch.bfloat16
    assert load_model(str(folder), dtype="float32").dtype == torch.float32
    loaded = load_model(folder, dtype=torch.float16)
    assert loaded.dtype == torch.float16
    assert load_model(loaded._module, processor=loaded.processor).dtype == torch.float16
    assert load_model(loaded._module, processor=folder, dtype="float32").dtype == torch.float32


def test_bfloat16_runs_and_moves(folder: Path) -> None:
    loaded = load_model(folder, device="cpu")
    batch = loaded.encode(prompt(picture(30, 50), "what ?")).to("cpu")
    with torch.no_grad(), loaded.trace(**batch):
        value = loaded.hooks["blocks.1.hook_resid_post"].save()
    assert value.dtype == torch.bfloat16
    assert value.isfinite().all()


def test_from_pretrained_arguments_arrive(folder: Path) -> None:
    loaded = load_model(folder, attn_implementation="eager", local_files_only=True)
    assert loaded.attn_implementation == "eager"
    assert load_model(folder, device_map="cpu").device == torch.device("cpu")


def test_remote_code_is_off_unless_asked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = copy_of(folder, tmp_path)
    config = json.loads((target / "config.json").read_text())
    marker = tmp_path / "it-ran"
    (target / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    config["auto_map"] = {"AutoConfig": "own.Own"}
    config["model_type"] = "own_type"
    (target / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    with pytest.raises(ModelLoadError):
        load_model(target)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["nobody/there-is-no-such-model-9f3", "not a name at all", "does/not/exist/anywhere"])
def test_a_name_that_cannot_be_reached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="cannot load the configuration") as caught:
        load_model(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="configuration"):
        load_model(tmp_path)


def test_a_folder_that_is_no_vision_language_model(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'llama'.*supported are .*llava_next"):
        load_model(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'llama'"):
        load_model(LlamaForCausalLM(config), processor=object())


@pytest.mark.parametrize(
    ("missing", "says"),
    [("model.safetensors", "weights"), ("config.json", "configuration"), ("tokenizer.json", "processor")],
)
def test_a_folder_with_a_file_missing(folder: Path, tmp_path: Path, missing: str, says: str) -> None:
    with pytest.raises(ModelLoadError, match=says):
        load_model(copy_of(folder, tmp_path, without=missing))


@pytest.mark.parametrize(("damaged", "says"), [("config.json", "configuration"), ("model.safetensors", "weights")])
def test_a_folder_with_a_damaged_file(folder: Path, tmp_path: Path, damaged: str, says: str) -> None:
    target = copy_of(folder, tmp_path)
    (target / damaged).write_bytes((target / damaged).read_bytes()[:100])
    with pytest.raises(ModelLoadError, match=says) as caught:
        load_model(target)
    assert "\n" not in str(caught.value)


def test_contradictory_arguments(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="device_map"):
        load_model(folder, device="cpu", device_map="cpu")
    with pytest.raises(MultimodalError, match="float33"):
        load_model(folder, dtype="float33")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda" if not torch.cuda.is_available() else "cuda:98"])
def test_a_device_that_is_not_there(device: str, folder: Path, model: VisionLanguageModel) -> None:
    for name in (folder, model._module):
        with pytest.raises(ModelLoadError, match=rf"device='{device}'.* does not have; expected one such as 'cpu'"):
            load_model(name, device=device, processor=model.processor)


def test_token_strings_are_readable(model: VisionLanguageModel) -> None:
    batch = model.encode(prompt("is this red ?"))
    words = model.token_strings(batch["input_ids"][0])
    assert len(words) == batch["input_ids"].shape[1]
    assert [word.strip() for word, kept in zip(words, batch.layout.kept[0], strict=True) if kept] == [
        "is", "this", "red", "?",
    ]  # fmt: skip


def test_a_layout_survives_pickling(model: VisionLanguageModel, images: list[Any]) -> None:
    """Batches are made in worker processes too."""
    batch = model.encode(prompt(images[0], "what ?"))
    again = pickle.loads(pickle.dumps(batch.layout))
    assert torch.equal(again.modality, batch.layout.modality)
