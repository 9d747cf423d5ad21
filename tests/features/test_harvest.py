"""A harvest of the tiny model, against all its activations; and what happens when it is interrupted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sae_lens import SAE

import sae_lens_multimodal.features.harvest as harvest_module
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.mixture import Member, Mixture
from sae_lens_multimodal.data.stream import open_dataset, read_prompts
from sae_lens_multimodal.errors import ConfigError, FeatureError, SAEMismatchError, StoreError
from sae_lens_multimodal.features.harvest import harvest
from sae_lens_multimodal.features.hashing import image_id
from sae_lens_multimodal.features.schema import TABLES
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.types import Modality

Rows = list[dict[str, Any]]
SETTINGS: dict[str, Any] = {
    "n_top": 3,
    "n_ordinary": 2,
    "n_silent": 2,
    "batch_size": 4,
    "seed": 1,
    "checkpoint_batches": 2,
    "progress": False,
}
NAMES = {"image": Modality.IMAGE, "text": Modality.TEXT}


@dataclass
class Truth:
    """Every activation of one prompt, from a forward pass of its own."""

    prompt_id: int
    labels: np.ndarray
    z: np.ndarray
    pictures: frozenset[str]

    def of(self, name: str) -> np.ndarray:
        return self.z[self.labels == NAMES[name].value]


@pytest.fixture(scope="module")
def truth(model: VisionLanguageModel, sae: SAE[Any], rows: Rows) -> list[Truth]:
    found = []
    for prompt in read_prompts(open_dataset(rows)):
        batch = model.encode(prompt.messages)
        hook = sae.cfg.metadata.hook_name
        with torch.no_grad():
            z = sae.encode(read_activations(model, batch, hook, stop=False)[hook][0])
        pictures = frozenset(map(image_id, prompt.images)) or frozenset({str(batch["input_ids"].tolist())})
        found.append(Truth(prompt.row, batch.layout.modality[0].numpy(), z.to_dense().numpy(), pictures))
    return found


@pytest.fixture(scope="module")
def store(
    model: VisionLanguageModel, sae: SAE[Any], rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    return harvest(model, sae, rows, tmp_path_factory.mktemp("harvest") / "store", **SETTINGS)


def test_statistics_are_those_of_all_activations(store: FeatureStore, truth: list[Truth]) -> None:
    assert store.all_features == list(range(96))
    whole = {name: np.concatenate([one.of(name) for one in truth]) for name in NAMES}
    assert store.settings["n_tokens"] == {name: len(z) for name, z in whole.items()}
    columns = {name: store.statistics[name].to_numpy() for name in store.statistics.column_names}
    for name, z in whole.items():
        # one token in a thousand may fall on the other side of the k-th place in a batch of another shape
        np.testing.assert_allclose(columns[f"density_{name}"], (z > 0).mean(0), atol=1e-3)
        np.testing.assert_allclose(columns[f"mean_{name}"], z.mean(0), atol=1e-3)
        np.testing.assert_allclose(columns[f"max_{name}"], z.max(0), atol=1e-3)
    means = {name: z.mean(0) for name, z in whole.items()}
    alive = means["image"] + means["text"] > 0.01
    score = means["image"] / (means["image"] + means["text"] + 1e-30)
    np.testing.assert_allclose(columns["modality_score"][alive], score[alive], atol=0.02)


def test_top_examples_are_those_of_a_full_sort(store: FeatureStore, truth: list[Truth]) -> None:
    by_row = {one.prompt_id: one for one in truth}
    checked = 0
    for feature in store.features:
        for name in NAMES:
            best: dict[frozenset[str], float] = {}
            for one in truth:
                peak = float(one.of(name)[:, feature].max(initial=0))
                best[one.pictures] = max(best.get(one.pictures, 0), peak)
            expected = sorted((peak for peak in best.values() if peak > 1e-3), reverse=True)[:3]
            found = store.examples(feature, "top", name)  # type: ignore[arg-type]
            peaks = [example.max_image if name == "image" else example.max_text for example in found]
            assert peaks[: len(expected)] == pytest.approx(expected, abs=1e-3)
            pictures = [by_row[example.prompt_id].pictures for example in found]
            assert len(set(pictures)) == len(pictures)
            checked += len(found)
    assert checked > 50


def test_examples_show_the_activations_of_their_prompt(store: FeatureStore, truth: list[Truth]) -> None:
    by_row = {one.prompt_id: one for one in truth}
    for feature in store.features[:30]:
        for kind in ("top", "ordinary"):
            for example in store.examples(feature, kind):  # type: ignore[arg-type]
                one = by_row[example.prompt_id]
                kept = np.isin(one.labels, [label.value for label in NAMES.values()])
                assert example.layout.modality[0].tolist() == one.labels.tolist()
                assert len(example.tokens) == len(one.labels)
                wanted = np.where(kept, one.z[:, feature], 0)
                assert np.mean(np.abs(example.activations - wanted) > 1e-3) < 0.02
                assert set(example.image_ids) == one.pictures or not example.images
                assert list(map(image_id, example.images)) == example.image_ids
                assert [picture.size for picture in example.images] == list(example.layout.image_sizes[0])


def test_silent_examples_are_silent(store: FeatureStore, truth: list[Truth]) -> None:
    by_row = {one.prompt_id: one for one in truth}
    checked = 0
    for feature in store.all_features:
        for name in NAMES:
            for example in store.examples(feature, "silent", name):  # type: ignore[arg-type]
                assert by_row[example.prompt_id].of(name)[:, feature].max() < 1e-3
                assert example.positions.size == 0
                checked += 1
    assert checked > 50


def test_a_row_that_cannot_be_read_is_skipped_and_reported(store: FeatureStore, rows: Rows) -> None:
    report = store.settings["rows"]
    assert (report["read"], report["skipped"]) == (len(rows), 1)
    assert report["examples"]["picture cannot be opened"][0][0] == 9
    assert 9 not in store.prompt_ids
    assert store.settings["n_prompts"] == len(rows) - 1


def contents(folder: Path) -> dict[str, Any]:
    tables = {name: pq.read_table(folder / f"{name}.parquet").to_pylist() for name in TABLES}
    files = {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "images").rglob("*.png")}
    return {"tables": repr(tables), "files": files, "settings": FeatureStore.open(folder).settings}


class Killed(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("batches", [1, 3])
def test_a_killed_harvest_goes_on_and_leaves_the_same_store(
    model: VisionLanguageModel,
    sae: SAE[Any],
    rows: Rows,
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches: int,
) -> None:
    reads = []

    def killing(*args: Any, **kwargs: Any) -> Any:
        if len(reads) == batches:
            raise Killed
        reads.append(1)
        return read_activations(*args, **kwargs)

    monkeypatch.setattr(harvest_module, "read_activations", killing)
    with pytest.raises(Killed):
        harvest(model, sae, rows, tmp_path / "store", **SETTINGS)
    with pytest.raises(StoreError, match="unfinished harvest; run the same harvest again"):
        FeatureStore.open(tmp_path / "store")
    counted = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return read_activations(*args, **kwargs)

    monkeypatch.setattr(harvest_module, "read_activations", counting)
    again = harvest(model, sae, rows, tmp_path / "store", **SETTINGS)
    assert len(counted) == 4 - batches // 2 * 2, "what a checkpoint holds is not read again"
    assert contents(again.folder) == contents(store.folder)
    assert not (again.folder / "progress").exists()


def test_checkpoints_and_sweeps_change_nothing(
    model: VisionLanguageModel,
    sae: SAE[Any],
    rows: Rows,
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sae_lens_multimodal.features.shelf._SLACK_PROMPTS", -1000)
    monkeypatch.setattr("sae_lens_multimodal.features.payload._SLACK_ENTRIES", 0)
    often = harvest(model, sae, rows, tmp_path / "store", **{**SETTINGS, "checkpoint_batches": 1})
    assert contents(often.folder) == contents(store.folder)


def test_a_killed_finish_is_done_again(
    model: VisionLanguageModel,
    sae: SAE[Any],
    rows: Rows,
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killing(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(harvest_module, "write_manifest", killing)
        harvest(model, sae, rows, tmp_path / "store", **SETTINGS)
    assert contents(harvest(model, sae, rows, tmp_path / "store", **SETTINGS).folder) == contents(store.folder)


def test_a_finished_harvest_is_returned_as_it_is(
    model: VisionLanguageModel, sae: SAE[Any], rows: Rows, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(harvest_module, "read_activations")
    assert harvest(model, sae, rows, store.folder, **SETTINGS).features == store.features


def test_a_harvest_with_other_settings_is_refused(
    model: VisionLanguageModel, sae: SAE[Any], rows: Rows, store: FeatureStore, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=r"holds a harvest with seed=1; this one has seed=2\. Give another folder"):
        harvest(model, sae, rows, store.folder, **{**SETTINGS, "seed": 2})
    with pytest.raises(StoreError, match="harvest with dataset="):
        harvest(model, sae, rows[1:], store.folder, **SETTINGS)
    with pytest.raises(StoreError, match="resume is off"):
        harvest(model, sae, rows, store.folder, **SETTINGS, resume=False)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("")
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        harvest(model, sae, rows, tmp_path / "letters", **SETTINGS)
    with pytest.raises(StoreError, match="is a file"):
        harvest(model, sae, rows, tmp_path / "letters" / "a.txt", **SETTINGS)


def test_some_features_give_what_all_give(
    model: VisionLanguageModel, sae: SAE[Any], rows: Rows, store: FeatureStore, tmp_path: Path
) -> None:
    chosen = [5, 2, 70]
    some = harvest(model, sae, rows, tmp_path / "store", features=chosen, **SETTINGS)
    assert some.all_features == sorted(chosen)
    for name in ("statistics", "examples"):
        mine, whole = (pq.read_table(one.folder / f"{name}.parquet").to_pylist() for one in (some, store))
        assert mine == [row for row in whole if row["feature"] in chosen]
    with pytest.raises(FeatureError):
        store.examples(96)


def test_ranking_by_mean(
    model: VisionLanguageModel, sae: SAE[Any], rows: Rows, truth: list[Truth], tmp_path: Path
) -> None:
    store = harvest(model, sae, rows, tmp_path / "store", **{**SETTINGS, "rank": "mean", "n_silent": 0})
    for feature in store.features[:20]:
        best: dict[frozenset[str], float] = {}
        for one in truth:
            z = one.of("image")[:, feature]
            best[one.pictures] = max(best.get(one.pictures, 0), float(z.mean()) if len(z) else 0)
        expected = sorted((mean for mean in best.values() if mean > 1e-3), reverse=True)[:3]
        found = [example.mean_image for example in store.examples(feature, "top", "image")]
        assert found[: len(expected)] == pytest.approx(expected, abs=2e-3)


def test_references_reopen_pictures_from_the_dataset(
    model: VisionLanguageModel, sae: SAE[Any], rows: Rows, store: FeatureStore, tmp_path: Path
) -> None:
    kept = harvest(model, sae, rows, tmp_path / "store", keep_images="reference", **SETTINGS)
    assert not list(kept.folder.rglob("*.png"))
    feature = next(one for one in kept.features if kept.examples(one, "top", "image"))
    names = [example.image_ids for example in kept.examples(feature, "top", "image")]
    assert names == [example.image_ids for example in store.examples(feature, "top", "image")]
    for example in kept.examples(feature, "top", "image"):
        assert list(map(image_id, example.images)) == example.image_ids
    (example, *_) = FeatureStore.open(kept.folder).examples(feature, "top", "image")
    with pytest.raises(StoreError, match="open it with the dataset that was harvested"):
        _ = example.images
    (example, *_) = FeatureStore.open(kept.folder, dataset=rows[::-1]).examples(feature, "top", "image")
    with pytest.raises(StoreError, match="does not hold picture"):
        _ = example.images


def test_prompts_that_are_too_long_or_too_many_are_left_out(
    model: VisionLanguageModel, sae: SAE[Any], rows: Rows, truth: list[Truth], new_folder: Callable[[], Path]
) -> None:
    few = harvest(model, sae, rows, new_folder(), max_prompts=5, **SETTINGS)
    assert (few.settings["n_prompts"], max(few.prompt_ids)) == (5, 4)
    length = int(np.median([len(one.labels) for one in truth]))
    short = harvest(model, sae, rows, new_folder(), context_size=length, **SETTINGS)
    assert short.settings["n_prompts"] == sum(len(one.labels) <= length for one in truth)
    reasons = short.settings["rows"]["reasons"]
    assert reasons["prompt is longer than context_size"] == len(truth) - short.settings["n_prompts"]


def test_killed_with_dropped_prompts_reports_them_once(
    model: VisionLanguageModel,
    sae: SAE[Any],
    rows: Rows,
    new_folder: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {**SETTINGS, "context_size": 220, "checkpoint_batches": 1, "batch_size": 2}
    whole = harvest(model, sae, rows, new_folder(), **settings)
    folder, reads = new_folder(), []

    def killing(*args: Any, **kwargs: Any) -> Any:
        reads.append(1)
        if len(reads) % 3 == 0:
            raise Killed
        return read_activations(*args, **kwargs)

    monkeypatch.setattr(harvest_module, "read_activations", killing)
    for _ in range(20):
        try:
            harvest(model, sae, rows, folder, **settings)
            break
        except Killed:
            pass
    assert whole.settings["rows"]["skipped"] > 1
    assert contents(folder) == contents(whole.folder)


def test_workers_change_nothing(
    model: VisionLanguageModel, sae: SAE[Any], rows: Rows, store: FeatureStore, new_folder: Callable[[], Path]
) -> None:
    for n_workers in (0, 3):
        again = harvest(model, sae, rows, new_folder(), n_workers=n_workers, **SETTINGS)
        assert contents(again.folder) == contents(store.folder)


def test_a_mixture_is_harvested_and_resumed(
    model: VisionLanguageModel,
    sae: SAE[Any],
    rows: Rows,
    new_folder: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members = (Member(rows=rows[:6], weight=1.0, name="one"), Member(rows=rows[10:], weight=2.0, name="other"))
    mixture = Mixture(members, seed=4, stop="all_exhausted_without_replacement")
    settings = {**SETTINGS, "checkpoint_batches": 1, "batch_size": 3}
    whole = harvest(model, sae, mixture, new_folder(), **settings)
    n_rows = 6 + len(rows[10:])
    assert whole.settings["n_prompts"] == n_rows
    assert whole.settings["dataset"]["name"] == "1 one + 2 other"
    order = [prompt.images for prompt in read_prompts(mixture)]
    for prompt_id in whole.prompt_ids:
        assert whole.prompt(prompt_id).image_ids == list(map(image_id, order[prompt_id]))
    reads: list[int] = []

    def killing(*args: Any, **kwargs: Any) -> Any:
        reads.append(1)
        if len(reads) == 3:
            raise Killed
        return read_activations(*args, **kwargs)

    monkeypatch.setattr(harvest_module, "read_activations", killing)
    folder = new_folder()
    with pytest.raises(Killed):
        harvest(model, sae, mixture, folder, **settings)
    harvest(model, sae, mixture, folder, **settings)
    assert contents(folder) == contents(whole.folder)
    with pytest.raises(StoreError, match="harvest with dataset="):
        harvest(model, sae, Mixture(members, seed=5, stop=mixture.stop), folder, **settings)


def test_settings_that_cannot_work_are_refused(
    model: VisionLanguageModel, sae: SAE[Any], rows: Rows, tmp_path: Path
) -> None:
    for wrong in ({"n_top": -1}, {"rank": "median"}, {"keep_images": "no"}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=f"Got {next(iter(wrong))}="):
            harvest(model, sae, rows, tmp_path / "store", **{**SETTINGS, **wrong})
    with pytest.raises(FeatureError, match="96"):
        harvest(model, sae, rows, tmp_path / "store", features=[96], **SETTINGS)
    with pytest.raises(SAEMismatchError):
        harvest(model, sae, rows, tmp_path / "store", hook_name="blocks.0.mlp.hook_post", **SETTINGS)
    assert not (tmp_path / "store").exists()


def test_the_store_knows_its_sae(
    model: VisionLanguageModel, sae: SAE[Any], rows: Rows, new_folder: Callable[[], Path]
) -> None:
    store = harvest(model, sae, rows, new_folder(), max_prompts=3, progress=False)
    store.check_sae(sae)
    other = copy.deepcopy(sae)
    with torch.no_grad():
        other.W_enc.mul_(2)
    with pytest.raises(SAEMismatchError, match="the SAE that was harvested"):
        store.check_sae(other)
