"""Harvesting a mixture from the command line, and describing its features."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from sae_lens import TopKSAE, TopKSAEConfig

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.cli.main import main
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.scenes.folder import model_folder
from sae_lens_multimodal.scenes.rows import scene_rows


@pytest.fixture
def command(model: VisionLanguageModel, tmp_path: Path) -> list[str]:
    """Everything but where the prompts come from."""
    config = TopKSAEConfig(d_in=model.d_model, d_sae=24, k=3)
    config.metadata.hook_name = "blocks.0.hook_resid_post"
    TopKSAE(config).save_model(str(tmp_path / "sae"))
    output = ["--output", str(tmp_path / "store"), "--batch-size", "2", "--workers", "0"]
    return ["harvest", "--model", str(model_folder()), "--sae", str(tmp_path / "sae"), *output]


def test_a_mixture_is_harvested_and_described(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kind in (("one", "scene"), ("two", "text")):
        datasets.Dataset.from_list(list(scene_rows(5, 3, kinds=(kind,)))).to_parquet(tmp_path / f"{name}.parquet")
    entries = "".join(f"  - {{path: {tmp_path}/{name}.parquet, weight: 1.0}}\n" for name in ("one", "two"))
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"dataset_mixture:\n{entries}mixture_stop: all_exhausted_without_replacement\n")
    assert main([*command, "--mixture", str(mixture), "--describe"]) == 0
    assert "of 24 features fired" in capsys.readouterr().out
    store = FeatureStore.open(tmp_path / "store")
    assert store.settings["n_prompts"] == 6
    assert {name for name, count in store.settings["n_tokens"].items() if count} == {"image", "text"}
    found = [store.description(feature) for feature in store.features]
    assert all(one is not None and len(one.neighbours) == 8 for one in found)


@pytest.mark.parametrize(("text", "message"), [("path: a", "holds no list"), ("[a", "cannot be read as YAML")])
def test_what_is_no_mixture_costs_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "mixture.yaml").write_text(text)
    assert main([*command, "--mixture", str(tmp_path / "mixture.yaml")]) == 1
    assert message in capsys.readouterr().err
