"""Published SAEs are read as their formula says; saved ones are uploaded by SAE-Lens and come back the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.training import upload_saes_to_huggingface as uploading
from safetensors.torch import save_file

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, StoreError
from sae_lens_multimodal.hooks.saes import check_sae
from sae_lens_multimodal.training import published
from sae_lens_multimodal.training.published import LLAVA_NEXT_131K, load_published_sae
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner

Rows = list[dict[str, Any]]


def write_published(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Write an SAE as the LLaVA-NeXT paper's trainer does, with weights that tell the four apart."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    weights = {
        "encoder.weight": torch.randn(6, 4, generator=draw),
        "encoder.bias": torch.randn(6, generator=draw),
        "W_dec": torch.randn(6, 4, generator=draw),
        "b_dec": torch.randn(4, generator=draw),
    }
    settings = {
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": 6,
        "k": 2,
        "signed": False,
        "d_in": 4,
        **changes,
    }
    (folder / "cfg.json").write_text(json.dumps(settings))
    save_file(weights, folder / "sae.safetensors")
    return weights


def test_a_published_sae_does_what_its_formula_says(tmp_path: Path) -> None:
    weights = write_published(tmp_path / "model.layers.24")
    sae = load_published_sae(tmp_path, model_name="a model")
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    for token in x:
        # By hand, number by number: subtract b_dec, multiply, add the bias, keep the two largest, none below zero.
        centred = [float(token[i] - weights["b_dec"][i]) for i in range(4)]
        before = [
            sum(float(weights["encoder.weight"][f, i]) * centred[i] for i in range(4))
            + float(weights["encoder.bias"][f])
            for f in range(6)
        ]
        largest = sorted(range(6), key=before.__getitem__)[-2:]
        z = [max(before[f], 0.0) if f in largest else 0.0 for f in range(6)]
        back = [
            sum(z[f] * float(weights["W_dec"][f, i]) for f in range(6)) + float(weights["b_dec"][i]) for i in range(4)
        ]
        torch.testing.assert_close(sae.encode(token[None])[0], torch.tensor(z))
        torch.testing.assert_close(sae(token[None])[0], torch.tensor(back))
    assert sae.W_enc.dtype == torch.float32
    assert (sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name) == ("blocks.24.hook_resid_post", "a model")


def test_it_is_saved_and_loaded_as_a_plain_sae(tmp_path: Path, model: VisionLanguageModel) -> None:
    write_published(tmp_path / "model.layers.1")
    sae = load_published_sae(tmp_path / "model.layers.1", model_name=model.name)
    sae.save_model(tmp_path / "plain")
    again = SAE.load_from_disk(tmp_path / "plain")
    x = torch.randn(9, 4)
    assert torch.equal(again(x), sae(x))
    assert again.cfg.metadata.sae_lens_multimodal["settings"]["num_latents"] == 6
    with pytest.raises(ValueError, match="d_in=4"):
        check_sae(model, again)


def test_the_papers_sae_is_found_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_published(tmp_path / "model.layers.24")
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(published, "snapshot_download", download)
    sae = load_published_sae(LLAVA_NEXT_131K)
    assert sae.cfg.metadata.model_name == "llava-hf/llama3-llava-next-8b-hf"
    load_published_sae(LLAVA_NEXT_131K, layer="model.layers.24")
    assert asked[0] == (LLAVA_NEXT_131K, ["*cfg.json", "*sae.safetensors"])
    assert asked[1][1] == ["model.layers.24/cfg.json", "model.layers.24/sae.safetensors"]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"transcode": True}, ConfigError, "transcode set: it maps one hook to another"),
        ({"skip_connection": True}, ConfigError, "skip_connection set"),
        ({"signed": True}, ConfigError, "may be negative"),
        ({"activation": "groupmax"}, ConfigError, "activation 'groupmax'"),
        ({"k": 0}, StoreError, "k=0; expected a whole number"),
        ({"num_latents": 7}, StoreError, r"encoder.weight of shape \(6, 4\); expected \(7, 4\)"),
        ({"num_latents": 0, "expansion_factor": 2}, StoreError, r"expected \(8, 4\)"),
    ],
)
def test_other_kinds_are_refused(tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str) -> None:
    write_published(tmp_path / "layers.3", **changes)
    with pytest.raises(error, match=says):
        load_published_sae(tmp_path)


def test_what_cannot_be_found_is_named(tmp_path: Path) -> None:
    for name in ("layers.3", "layers.4", "elsewhere/mlp"):
        write_published(tmp_path / name)
    with pytest.raises(StoreError, match=r"several SAEs; choose one with layer=..., of: layers.3, layers.4"):
        load_published_sae(tmp_path)
    assert load_published_sae(tmp_path, layer="layers.4").cfg.metadata.hook_name == "blocks.4.hook_resid_post"
    with pytest.raises(ConfigError, match="'mlp' does not say where"):
        load_published_sae(tmp_path / "elsewhere")
    assert load_published_sae(tmp_path / "elsewhere", hook_name="h").cfg.metadata.hook_name == "h"
    with pytest.raises(StoreError, match=r"has no cfg.json and sae.safetensors"):
        load_published_sae(tmp_path, layer="layers.9")
    with pytest.raises(StoreError, match="is no folder and cannot be downloaded"):
        load_published_sae(str(tmp_path / "nothing"))


# ---- uploading -------------------------------------------------------------------------------------------------------


class FakeHub:
    """The hub as far as SAE-Lens calls it: a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def repo_info(self, _: HfApi, repo_id: str) -> object:
        if not (self.folder / repo_id).is_dir():
            raise RepositoryNotFoundError("no such repository", response=_answer())
        return SimpleNamespace(id=repo_id)

    def create_repo(self, repo_id: str) -> None:
        (self.folder / repo_id).mkdir(parents=True)

    def upload_folder(self, _: HfApi, *, folder_path: Path, path_in_repo: str, repo_id: str, **rest: Any) -> None:
        target = self.folder / repo_id / path_in_repo
        target.mkdir(parents=True)
        for path in Path(folder_path).iterdir():
            if path.name in rest["allow_patterns"]:
                shutil.copy(path, target)

    def upload_file(self, _: HfApi, *, path_or_fileobj: Any, path_in_repo: str, repo_id: str, **_rest: Any) -> None:
        (self.folder / repo_id / path_in_repo).write_bytes(path_or_fileobj.read())

    def metadata(self, url: str) -> None:
        raise EntryNotFoundError(url)

    def download(self, repo_id: str, filename: str, **_: Any) -> str:
        path = self.folder / repo_id / filename
        if not path.is_file():
            raise EntryNotFoundError(filename)
        return str(path)


def _answer() -> httpx.Response:
    return httpx.Response(404, request=httpx.Request("GET", "https://hub"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(HfApi, "repo_info", lambda api, name: fake.repo_info(api, name))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **given: fake.upload_folder(api, **given))
    monkeypatch.setattr(HfApi, "upload_file", lambda api, **given: fake.upload_file(api, **given))
    monkeypatch.setattr(uploading, "create_repo", fake.create_repo)
    monkeypatch.setattr(uploading, "get_hf_file_metadata", fake.metadata)
    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", fake.download)
    return fake


def test_sae_lens_uploads_what_is_saved_and_reads_it_back(
    model: VisionLanguageModel, make_config: Any, rows: Rows, hub: FakeHub
) -> None:
    config = make_config(sae={"architecture": "batchtopk"}, eval_losses=False)
    sae = MultimodalSAETrainingRunner(config, rows, model).run()
    uploading.upload_saes_to_huggingface(
        {"block1": config.output_path, "same": sae}, hf_repo_id="me/saes", show_progress=False
    )
    uploaded = {path.name for path in (hub.folder / "me/saes/block1").iterdir()}
    assert uploaded == {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "runner_cfg.json"}
    x = torch.randn(9, model.d_model)
    for name in ("block1", "same"):
        back = SAE.from_pretrained("me/saes", name)
        back = back[0] if isinstance(back, tuple) else back
        assert torch.equal(back(x), sae(x))
        assert check_sae(model, back) == "blocks.1.hook_resid_post"
    assert "block1" in (hub.folder / "me/saes/README.md").read_text()


def test_a_card_lies_beside_what_is_saved(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    config = make_config(eval_losses=False)
    runner = MultimodalSAETrainingRunner(config, rows, model)
    runner.run()
    card = (Path(config.output_path) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: saelens\n")
    assert "# topk SAE with 64 features at blocks.1.hook_resid_post of " in card
    assert "| tokens trained on | 128 text, 128 image |" in card
    assert f"| explained variance | {runner.metrics['image']['explained_variance']:.4g} | " in card
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(config.output_path))
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    assert names["features"].shape[-1] == 64
