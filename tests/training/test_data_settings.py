"""The settings of the data do what they say in a whole run."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sae_lens import SAE

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.mixture import Member, Mixture
from sae_lens_multimodal.data.rows import SkipReport
from sae_lens_multimodal.errors import ConfigError, ImageError
from sae_lens_multimodal.scenes import scenes_dataset
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig, build_config
from sae_lens_multimodal.training.config_file import load_config
from sae_lens_multimodal.training.prompts import PromptSource
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner
from sae_lens_multimodal.training.store import MultimodalActivationsStore
from sae_lens_multimodal.training.trained_on import TrainingRun

Rows = list[dict[str, Any]]
BROKEN = (7, 23, 31)


def broken(rows: Rows) -> Rows:
    """The rows with three whose picture is none."""
    return [{"image": b"no picture"} if index in BROKEN else row for index, row in enumerate(rows)]


@pytest.fixture
def mixture(tmp_path: Path) -> list[dict[str, Any]]:
    """Two datasets on disk of different columns: pictures with messages, and plain text."""
    scenes = datasets.Dataset.from_list(list(scenes_dataset(0, 40, kinds=["scene"]).decode(False)))
    scenes.to_parquet(tmp_path / "scenes.parquet")
    texts = [{"text": f"a red circle and a blue square , number {index} of the list ."} for index in range(30)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return [
        {"path": str(tmp_path / "scenes.parquet"), "weight": 1, "streaming": False},
        {"path": str(tmp_path / "texts.jsonl"), "weight": 3},
    ]


def trained(model: VisionLanguageModel, cfg: MultimodalSAERunnerConfig[Any], rows: Any = None) -> SAE[Any]:
    return MultimodalSAETrainingRunner(cfg, override_dataset=rows, override_model=model).run()


def test_a_mixture_is_trained_on_and_its_held_out_rows_are_found_again(
    model: VisionLanguageModel, make_config: Any, mixture: list[dict[str, Any]]
) -> None:
    cfg = make_config(dataset_mixture=mixture, n_eval_batches=2)
    sae = trained(model, cfg)
    origin = sae.cfg.metadata.sae_lens_multimodal
    assert origin["dataset_mixture"] == mixture
    assert all(entry["path"] in origin["dataset_path"] for entry in mixture)
    assert origin["rows"]["read"] == origin["rows"]["kept"] > 0
    held_out = TrainingRun.of(cfg.output_path).held_out(None, split="train", subset=None)
    assert held_out is not None
    prompts = list(held_out.evaluation(8))
    # Eight prompts by weight are two and six; of forty and of an unknown number of rows that many are held out.
    assert sorted(prompt.dataset for prompt in prompts) == sorted([mixture[0]["path"]] * 2 + [mixture[1]["path"]] * 6)
    held = {(prompt.dataset, prompt.text, prompt.images[0].tobytes() if prompt.images else b"") for prompt in prompts}
    seen = {(one.dataset, one.text, one.images[0].tobytes() if one.images else b"") for one in held_out.training()}
    assert len(held) == 8
    assert not held & seen
    assert len(seen) == 40 - 2 + 30 - 6


def test_a_mixtures_store_goes_on_where_it_was(
    model: VisionLanguageModel, make_config: Any, mixture: list[dict[str, Any]], tmp_path: Path
) -> None:
    cfg = make_config(dataset_mixture=mixture, token_shares=None, sae={"d_in": model.d_model})
    first = MultimodalActivationsStore.from_config(model, cfg)
    list(islice(first, 5))
    first.save(str(tmp_path / "state.safetensors"))
    again = MultimodalActivationsStore.from_config(model, cfg)
    again.load(str(tmp_path / "state.safetensors"))
    for one, other in zip(islice(first, 6), islice(again, 6), strict=True):
        assert torch.equal(one, other)
    first.finish_reading()
    again.finish_reading()


def test_epochs_of_a_mixture_differ_and_the_seed_decides() -> None:
    rows = [[{"text": f"{name}{index}"} for index in range(12)] for name in "ab"]
    mixed = Mixture(tuple(Member(rows=one, weight=w, name="x") for one, w in zip(rows, (1, 2), strict=True)))

    def texts(epoch: int, seed: int = 0) -> list[str]:
        source = PromptSource.split(mixed, held_out=2, seed=seed)
        return [prompt.text for prompt in source.epoch(epoch, skip_rows=0, report=SkipReport())]

    assert texts(0) == texts(0)
    assert len({tuple(texts(0)), tuple(texts(1)), tuple(texts(0, seed=1))}) == 3
    assert len(set(texts(0))) == 24 - 2


def test_the_sae_does_not_depend_on_the_workers(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    weights = [
        trained(model, make_config(n_data_workers=count, output_path=None), broken(rows)).state_dict()
        for count in (0, 3)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_listed_at_the_end_by_their_own_numbers(
    model: VisionLanguageModel, make_config: Any, rows: Rows, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = make_config(n_data_workers=workers, training_tokens=64 * 18, n_batches_in_buffer=18, n_eval_batches=0)
    with caplog.at_level(logging.WARNING):
        sae = trained(model, cfg, broken(rows)[:34])
    report = sae.cfg.metadata.sae_lens_multimodal["rows"]
    listed = {number for number, _ in report["examples"]["picture cannot be opened"]}
    assert listed == set(BROKEN), "though the rows were read in a shuffled order"
    assert report["reasons"]["picture cannot be opened"] >= 3
    assert f"{report['reasons']['picture cannot be opened']} of {report['read']} rows skipped: picture" in caplog.text
    assert "row 23: " in caplog.text


def test_strict_stops_with_the_rows_reason(model: VisionLanguageModel, make_config: Any, rows: Rows) -> None:
    with pytest.raises(ImageError, match=r"row (7|23|31): .*not a readable image"):
        trained(model, make_config(strict=True, n_eval_batches=0), broken(rows))


def test_long_prompts_are_cut_as_asked(model: VisionLanguageModel, make_config: Any, text_rows: Rows) -> None:
    changes = {"context_size": 12, "token_shares": None, "n_eval_batches": 1}
    cut = trained(model, make_config(**changes, too_long="truncate"), text_rows * 2)
    report = cut.cfg.metadata.sae_lens_multimodal["rows"]
    assert report["truncated"] > 0
    assert report["skipped"] == 0
    assert cut.cfg.metadata.sae_lens_multimodal["too_long"] == "truncate"


def test_settings_round_trip_and_wrong_ones_are_refused(make_config: Any, tmp_path: Path) -> None:
    entries = [{"path": "a/b", "weight": 0.5, "subset": "c"}, {"path": "d", "weight": 2}]
    cfg = make_config(dataset_mixture=entries, mixture_stop="first_exhausted", too_long="truncate", n_data_workers=5)
    again = build_config(json.loads(json.dumps(cfg.to_dict())))
    for name in ("dataset_mixture", "mixture_stop", "too_long", "n_data_workers"):
        assert getattr(again, name) == getattr(cfg, name)
    path = tmp_path / "run.yaml"
    path.write_text(
        "sae: {architecture: topk, d_sae: 64, k: 4}\nhook_name: x\n"
        "dataset_mixture:\n  - {path: a/b, weight: 0.5, subset: c}\n  - {path: d, weight: 2}\n"
    )
    assert load_config(path).dataset_mixture == entries
    flags = ["--dataset_mixture=[{path: e, weight: 1}]", "--too_long=truncate", "--n_data_workers=0"]
    overridden = load_config(path, flags)
    assert (overridden.dataset_mixture, overridden.too_long, overridden.n_data_workers) == (
        [{"path": "e", "weight": 1}],
        "truncate",
        0,
    )
    for changes, message in (
        ({"dataset_mixture": entries, "dataset_path": "x"}, "give one of them"),
        ({"dataset_mixture": [{"path": "x"}]}, "expected path and weight"),
        ({"mixture_stop": "never"}, "mixture_stop"),
        ({"too_long": "crop"}, "too_long"),
        ({"n_data_workers": -1}, "n_data_workers is -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config(**changes)
