"""Datasets from everywhere are read in order, and a corrupt row ends nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from sae_lens_multimodal.data import rows as rows_module
from sae_lens_multimodal.data import stream
from sae_lens_multimodal.data.rows import SkipReport
from sae_lens_multimodal.data.stream import open_dataset, read_prompts
from sae_lens_multimodal.errors import ConfigError, DatasetError, ImageError
from tests.data.data_samples import png

WAYS: dict[str, Callable[[datasets.Dataset], Any]] = {
    "dataset": lambda dataset: dataset,
    "formatted": lambda dataset: dataset.with_format("numpy"),
    "selected": lambda dataset: dataset.select(range(6)),
    "iterable": lambda dataset: dataset.to_iterable_dataset(),
    "sharded iterable": lambda dataset: dataset.to_iterable_dataset(num_shards=3),
    "list": lambda dataset: list(dataset.cast_column("image", datasets.Image(decode=False))),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_corrupt_picture_is_skipped_and_counted(way: str, image_dataset: datasets.Dataset) -> None:
    report = SkipReport()
    prompts = list(read_prompts(WAYS[way](image_dataset), report=report))
    assert [prompt.row for prompt in prompts] == [0, 1, 3, 4, 5]
    assert [prompt.extras["id"] for prompt in prompts] == [0, 1, 3, 4, 5]
    assert (report.read, report.kept, dict(report.reasons)) == (6, 5, {"picture cannot be opened": 1})
    assert report.examples["picture cannot be opened"][0][0] == 2


@pytest.mark.parametrize("way", WAYS)
def test_resuming_gives_the_same_rows_as_reading_on(way: str, image_dataset: datasets.Dataset) -> None:
    dataset = WAYS[way](image_dataset)
    whole = [(prompt.row, prompt.text) for prompt in read_prompts(dataset)]
    resumed = [(prompt.row, prompt.text) for prompt in read_prompts(dataset, skip_rows=3)]
    assert resumed == [one for one in whole if one[0] >= 3]
    assert list(read_prompts(dataset, skip_rows=6)) == []


def test_the_callers_dataset_is_left_as_it_was(image_dataset: datasets.Dataset) -> None:
    before = (image_dataset.features, image_dataset.format, image_dataset.column_names)
    list(read_prompts(image_dataset))
    assert (image_dataset.features, image_dataset.format, image_dataset.column_names) == before
    assert isinstance(image_dataset[0]["image"], Image.Image)


def test_nested_picture_features_are_not_decoded_either(rows: list[dict[str, Any]]) -> None:
    part = {"type": datasets.Value("string"), "image": datasets.Image(), "text": datasets.Value("string")}
    features = datasets.Features(
        {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})}
    )
    messages = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": row["image"], "text": None}]}]}
        for row in rows
    ]
    dataset = datasets.Dataset.from_list(messages, features=features)
    assert [prompt.row for prompt in read_prompts(dataset)] == [0, 1, 3, 4, 5]


def test_skipped_rows_are_not_opened(image_dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    original = rows_module.row_to_prompt

    def watched(row: Any, *, index: int, image_folder: Path | None) -> rows_module.Prompt:
        opened.append(index)
        return original(row, index=index, image_folder=image_folder)

    monkeypatch.setattr(stream, "row_to_prompt", watched)
    list(read_prompts(image_dataset, skip_rows=4))
    assert opened == [4, 5]


def test_a_callers_transform_is_honoured(image_dataset: datasets.Dataset) -> None:
    dataset = image_dataset.remove_columns("image").with_transform(
        lambda batch: {"text": [t.upper() for t in batch["text"]]}
    )
    assert [prompt.text for prompt in read_prompts(dataset, skip_rows=4)] == ["ROW 4", "ROW 5"]


def test_limit_counts_prompts(image_dataset: datasets.Dataset) -> None:
    assert [prompt.row for prompt in read_prompts(image_dataset, limit=3)] == [0, 1, 3]
    assert list(read_prompts(image_dataset, limit=0)) == []


def test_strict_raises_at_the_first_unusable_row(image_dataset: datasets.Dataset) -> None:
    reading = read_prompts(image_dataset, strict=True)
    assert [prompt.row for prompt in islice(reading, 2)] == [0, 1]
    with pytest.raises(ImageError):
        next(reading)


def test_mixed_rows_are_read_each_in_its_own_shape() -> None:
    rows = [
        {"note": "nothing usable", "text": None},
        {"text": "words"},
        {"image": png()},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    report = SkipReport()
    prompts = list(read_prompts(rows, report=report))
    assert [prompt.text for prompt in prompts] == ["words", "<image>", "hi"]
    assert report.skipped == 1


def test_generators_and_iterables_without_known_columns() -> None:
    def generate() -> Iterator[dict[str, Any]]:
        for index in range(3):
            yield {"image": Image.new("RGB", (4, 4)), "caption": str(index)}

    dataset = datasets.IterableDataset.from_generator(generate)
    assert [prompt.text for prompt in read_prompts(dataset, skip_rows=1)] == ["<image> 1", "<image> 2"]
    assert len(list(read_prompts(open_dataset(generate())))) == 3


@pytest.mark.parametrize("dataset", [[{"foo": 1}], datasets.Dataset.from_dict({"foo": [1]})])
def test_no_usable_column_lists_what_was_found(dataset: Any) -> None:
    with pytest.raises(DatasetError, match=r"columns foo, none of which.*image / images"):
        next(read_prompts(dataset))
    with pytest.raises(DatasetError, match="columns foo"):
        next(read_prompts(datasets.Dataset.from_dict({"foo": [1]}).to_iterable_dataset()))


def test_nothing_but_failures_ends_with_the_reasons() -> None:
    with pytest.raises(DatasetError, match=r"None of the first 3 rows.*3 picture cannot be opened"):
        list(read_prompts([{"image": b"x"}] * 3))
    # A resumed run may end on unusable rows.
    assert list(read_prompts([{"image": b"x"}] * 3, skip_rows=1)) == []


def test_a_long_dataset_of_failures_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_GIVE_UP_AFTER", 5)
    endless = datasets.Dataset.from_dict({"image": [b"x"] * 50})
    report = SkipReport()
    with pytest.raises(DatasetError, match="first 5 rows"):
        list(read_prompts(endless, report=report))
    assert report.read == 5


def test_empty_dataset_and_bad_arguments() -> None:
    with pytest.raises(DatasetError, match="no rows"):
        list(read_prompts([]))
    with pytest.raises(ConfigError, match="skip_rows=-1"):
        list(read_prompts([{"text": "a"}], skip_rows=-1))
    with pytest.raises(ConfigError, match="limit=-1"):
        list(read_prompts([{"text": "a"}], limit=-1))


@pytest.mark.parametrize("streaming", [True, False])
def test_files_and_folders(
    streaming: bool, tmp_path: Path, image_dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    image_dataset.to_parquet(tmp_path / "rows.parquet")
    llava = [
        {"id": str(index), "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}
        for index in range(3)
    ]
    (tmp_path / "list.json").write_text(json.dumps(llava))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, llava)))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.png").write_bytes(png() if index else b"broken")

    def read(source: str | Path) -> list[int]:
        return [prompt.row for prompt in read_prompts(open_dataset(source, streaming=streaming))]

    assert read(tmp_path / "rows.parquet") == [0, 1, 3, 4, 5]
    assert read(tmp_path / "list.json") == [0, 1, 2]
    assert read(str(tmp_path / "lines.jsonl")) == [0, 1, 2]
    assert read(folder) == [1, 2]


def test_saved_datasets_and_splits(tmp_path: Path, image_dataset: datasets.Dataset) -> None:
    image_dataset.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict(train=image_dataset, test=image_dataset.select([0]))
    splits.save_to_disk(tmp_path / "splits")
    assert len(list(read_prompts(open_dataset(tmp_path / "one")))) == 5
    assert len(list(read_prompts(open_dataset(tmp_path / "splits", split="test")))) == 1
    assert len(list(read_prompts(open_dataset(splits, split="test")))) == 1
    with pytest.raises(DatasetError, match=r"no split 'dev'.*train, test"):
        open_dataset(splits, split="dev")


def test_what_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "missing", "does not exist"),
        ("./missing.parquet", "does not exist"),
        (tmp_path / "notes.docx", "expected one of .parquet"),
        (tmp_path / "empty", "cannot be opened"),
        (3, "type int"),
        ([3], "list of mappings"),
    ):
        with pytest.raises(DatasetError, match=message):
            open_dataset(source)


def test_webdataset_tar(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for index in range(2):
            for suffix, content in (("png", png()), ("txt", f"caption {index}".encode())):
                entry = tarfile.TarInfo(f"{index:03}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    prompts = list(read_prompts(open_dataset(tmp_path / "shard.tar")))
    assert [prompt.text for prompt in prompts] == ["<image> caption 0", "<image> caption 1"]
