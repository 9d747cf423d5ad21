"""Cached activations: training from them is training live; they are checked, resumed, and foretold."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.cli.main import main
from sae_lens_multimodal.data.rows import SkipReport
from sae_lens_multimodal.errors import ConfigError, SAEMismatchError, StoreError
from sae_lens_multimodal.files import read_json
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.training.cache import cache_activations, forecast_cache
from sae_lens_multimodal.training.cache_files import PROGRESS_NAME, CacheReader, CacheWriter
from sae_lens_multimodal.training.cached_store import CachedActivationsStore
from sae_lens_multimodal.training.prompts import open_source
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner, fitted_config
from sae_lens_multimodal.types import Modality

Rows = list[dict[str, Any]]
SHARD = 60_000


@pytest.fixture
def in_cache(make_config: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        return make_config(**{"cached_activations_path": str(tmp_path / "cache"), "eval_losses": False, **changes})

    return make


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "sae_weights.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "changes",
    [
        {"activations_mixing_fraction": 0.5},
        {"sae": {"architecture": "batchtopk", "normalize_activations": "expected_average_only_in"}},
        {"token_shares": None, "n_rows": 12},
        {"max_norm_ratio": 1.5},
    ],
    ids=["mixing", "batchtopk", "several epochs", "norm filter"],
)
def test_training_from_the_cache_is_training_live(
    model: VisionLanguageModel, in_cache: Any, rows: Rows, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {"training_tokens": 64 * 8, "n_batches_for_norm_estimate": 3, **changes}
    rows = rows[: changes.pop("n_rows", 60)]
    live = MultimodalSAETrainingRunner(in_cache(**changes, output_path=str(tmp_path / "live")), rows, model)
    live.run()
    cache_activations(in_cache(**changes), rows, model, shard_bytes=SHARD)
    config = in_cache(**changes, use_cached_activations=True, output_path=str(tmp_path / "cached"))
    # Neither model nor dataset.
    cached = MultimodalSAETrainingRunner(config)
    cached.run()
    assert equal(weights(tmp_path / "live"), weights(tmp_path / "cached"))
    assert cached.metrics == live.metrics
    one, other = (
        read_json(tmp_path / name / "cfg.json")["metadata"]["sae_lens_multimodal"] for name in ("live", "cached")
    )
    for name in ("tokens_seen", "tokens_read", "tokens_dropped", "tokens_outlying", "rows_read", "dataset_path"):
        assert one[name] == other[name], name


def test_what_is_cached_is_what_the_model_gives_with_its_labels(
    model: VisionLanguageModel, in_cache: Any, rows: Rows, tmp_path: Path
) -> None:
    config = in_cache(store_batch_size_prompts=1, token_shares=None, newline_tokens=True, training_tokens=64 * 40)
    folder = cache_activations(config, rows, model, shard_bytes=SHARD)
    source = open_source(config, rows)
    reader = CacheReader(folder)
    assert len([shard for shard in reader.shards if shard.part == "train"]) > 1
    assert reader.n_batches("held_out") == 1
    for index, prompt in zip(range(3), source.epoch(0, skip_rows=0, report=SkipReport()), strict=False):
        batch = model.encode([prompt.messages])
        expected = read_activations(model, batch, config.hook_name)[config.hook_name][0]
        layout = batch.layout
        places = [
            at
            for at in range(layout.n_tokens)
            if layout.modality[0, at] in (Modality.TEXT, Modality.IMAGE, Modality.NEWLINE)
        ]
        activations, labels = reader.read(index)
        assert torch.equal(activations, expected[places])
        assert labels.modality.tolist() == layout.modality[0, places].tolist()
        assert labels.image_index.tolist() == layout.image_index[0, places].tolist()
        assert labels.tile.tolist() == layout.tile[0, places].tolist()
        assert set(labels.row.tolist()) == {prompt.row}
    assert activations.dtype == torch.float32


def test_the_precision_of_the_model_is_kept(in_cache: Any, rows: Rows) -> None:
    half = load_model(model_folder(), dtype=torch.bfloat16)
    config = in_cache(training_tokens=64, n_eval_batches=0)
    folder = cache_activations(config, rows, half)
    with safe_open(folder / "train-00000.safetensors", framework="pt") as file:
        assert file.get_tensor("activations").dtype == torch.bfloat16
    assert CacheReader(folder).read(0).activations.dtype == torch.bfloat16


def test_a_narrower_choice_of_tokens_trains_from_the_same_cache(
    model: VisionLanguageModel, in_cache: Any, rows: Rows, tmp_path: Path
) -> None:
    cache_activations(in_cache(training_tokens=64 * 40, token_shares=None), rows, model)
    changes = {"image_tokens": "base", "n_eval_batches": 1, "token_shares": {"image": 1.0}}
    live = MultimodalSAETrainingRunner(in_cache(**changes, output_path=str(tmp_path / "live")), rows, model)
    cached = MultimodalSAETrainingRunner(
        in_cache(**changes, use_cached_activations=True, output_path=str(tmp_path / "cached"))
    )
    live.run()
    cached.run()
    assert equal(weights(tmp_path / "live"), weights(tmp_path / "cached"))


def test_a_longer_run_and_another_seed_go_through_the_cache_in_other_orders(
    model: VisionLanguageModel, in_cache: Any, rows: Rows
) -> None:
    cache_activations(in_cache(n_batches_in_buffer=1, activations_mixing_fraction=0.0), rows, model)
    changes = {"use_cached_activations": True, "n_batches_in_buffer": 1, "activations_mixing_fraction": 0.0}
    store = CachedActivationsStore.open(in_cache(**changes, training_tokens=64 * 400))
    first = store._order()
    assert first == list(range(store.cache.n_batches()))
    while store.epoch == 0:
        next(store)
    assert store._order() != first
    assert sorted(store._order()) == first
    assert CachedActivationsStore.open(in_cache(**changes, seed=7))._order() != first


def killed(work: Callable[[], object]) -> bool:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_killed_writer_goes_on_where_it_was(
    model: VisionLanguageModel, in_cache: Any, rows: Rows, tmp_path: Path
) -> None:
    changes = {"training_tokens": 64 * 8, "activations_mixing_fraction": 0.3}
    whole = cache_activations(
        in_cache(**changes, cached_activations_path=str(tmp_path / "whole")), rows, model, shard_bytes=SHARD
    )

    def kill_at(number: int, *, written: bool) -> None:
        write = CacheWriter._write

        def killing(self: CacheWriter, part: str, pending: Any) -> Any:
            shard = write(self, part, pending) if written else None
            if len(self.shards) == number:
                if not written:
                    (self.folder / ".train-0000.abc.safetensors").write_bytes(b"half a shard")
                os.kill(os.getpid(), signal.SIGKILL)
            return shard if written else write(self, part, pending)

        CacheWriter._write = killing  # type: ignore[method-assign]
        cache_activations(in_cache(**changes), rows, model, shard_bytes=SHARD)

    folder = tmp_path / "cache"
    for number, written in ((0, False), (1, True), (2, False), (3, True)):
        assert killed(lambda number=number, written=written: kill_at(number, written=written))
        with pytest.raises(StoreError, match=r"is not whole|has no manifest"):
            CacheReader(folder)
    with pytest.raises(StoreError, match="begun with other settings"):
        cache_activations(in_cache(**changes, seed=5), rows, model, shard_bytes=SHARD)
    cache_activations(in_cache(**changes), rows, model, shard_bytes=SHARD)
    assert CacheReader(folder).shards == CacheReader(whole).shards  # checksums and all
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    assert not (folder / PROGRESS_NAME).exists()


def test_the_size_is_foretold_and_a_small_disk_refused(
    model: VisionLanguageModel, in_cache: Any, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_cache(training_tokens=64 * 40)
    fitted = fitted_config(config, model)
    forecast = forecast_cache(fitted, model, open_source(config, rows), tmp_path)
    said: list[str] = []
    folder = cache_activations(config, rows, model, say=said.append)
    actual = sum(path.stat().st_size for path in folder.iterdir())
    assert 0.6 < forecast.n_bytes / actual < 1.7
    assert said == [str(forecast)] or said[0].split(";")[0] == str(forecast).split(";")[0]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1000))
    with pytest.raises(StoreError, match=r"would take about .* 1000 bytes are free; free space"):
        cache_activations(in_cache(cached_activations_path=str(tmp_path / "b")), rows, model)
    assert not list((tmp_path / "b").iterdir())


def test_damage_is_found(model: VisionLanguageModel, in_cache: Any, rows: Rows, tmp_path: Path) -> None:
    folder = cache_activations(in_cache(), rows, model)
    with pytest.raises(StoreError, match="holds a whole cache already"):
        cache_activations(in_cache(), rows, model)
    shard = folder / "train-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    store = CachedActivationsStore.open(in_cache(use_cached_activations=True))
    with pytest.raises(StoreError, match=r"train-00000.safetensors is not what was written: its checksum differs"):
        next(store)
    shard.write_bytes(content[:-8])
    with pytest.raises(StoreError, match="missing or cut short"):
        CachedActivationsStore.open(in_cache(use_cached_activations=True))
    with pytest.raises(StoreError, match=r"has no manifest.json"):
        CachedActivationsStore.open(in_cache(use_cached_activations=True, cached_activations_path=str(tmp_path / "no")))


def test_another_runs_cache_is_refused(model: VisionLanguageModel, in_cache: Any, rows: Rows) -> None:
    cache_activations(in_cache(image_tokens="base", hook_name="blocks.1.hook_out"), rows, model)
    same = {"use_cached_activations": True, "image_tokens": "base"}
    CachedActivationsStore.open(in_cache(**same))
    for change, says in (
        ({"hook_name": "blocks.2.hook_resid_post"}, "cached with hook_name='blocks.1.hook_resid_post'"),
        ({"image_tokens": "all"}, "cached with image_tokens='base'"),
        ({"context_size": 99}, "cached with context_size=4096, the settings say 99"),
        ({"model_name": "another"}, "cached with model_name="),
    ):
        with pytest.raises(ConfigError, match=says):
            CachedActivationsStore.open(in_cache(**{**same, **change}))
    with pytest.raises(SAEMismatchError, match=r"sae.d_in is 9, but .* wide"):
        CachedActivationsStore.open(in_cache(**same, sae={"d_in": 9}))
    with pytest.raises(ConfigError, match="cached_activations_path is not set"):
        cache_activations(in_cache(cached_activations_path=None), rows, model)


def test_a_run_from_the_cache_goes_on_bit_for_bit(
    model: VisionLanguageModel, in_cache: Any, rows: Rows, tmp_path: Path
) -> None:
    changes = {"training_tokens": 64 * 8, "use_cached_activations": True, "n_checkpoints": 2}
    cache_activations(in_cache(**changes), rows, model)
    again = {"checkpoint_path": str(tmp_path / "checkpoints"), "resume_from_checkpoint": "latest"}
    whole = in_cache(**changes, **again, output_path=str(tmp_path / "whole"))
    MultimodalSAETrainingRunner(whole).run()
    for child in Path(whole.checkpoint_path).iterdir():
        if child.name != "192":
            shutil.rmtree(child)
    MultimodalSAETrainingRunner(in_cache(**changes, **again, output_path=str(tmp_path / "again"))).run()
    assert [child.name for child in Path(whole.checkpoint_path).iterdir()] != ["192"]
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "again"))


def test_the_commands_cache_and_train_from_the_cache(
    tmp_path: Path, text_rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in text_rows))
    settings = {
        "sae": {"architecture": "topk", "d_sae": 64, "k": 4},
        "model_name": str(model_folder()),
        "hook_name": "blocks.1.hook_resid_post",
        "dataset_path": str(dataset),
        "token_shares": {"text": 1.0},
        "training_tokens": 128,
        "train_batch_size_tokens": 64,
        "n_batches_in_buffer": 2,
        "n_eval_batches": 0,
        "device": "cpu",
        "checkpoint_path": None,
        "output_path": str(tmp_path / "sae"),
        "cached_activations_path": str(tmp_path / "cache"),
        "progress": False,
    }
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(settings))
    assert main(["cache", str(file)]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(tmp_path / "cache")
    assert re.search(r"about [\d,]+ tokens of [\d,]+ prompts, .* are free", shown.err)
    dataset.unlink()
    assert main(["train", str(file), "--use-cached-activations"]) == 0
    assert weights(str(tmp_path / "sae"))["W_enc"].shape[1] == 64
    capsys.readouterr()
    assert main(["cache", str(file)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {dataset} does not exist")
