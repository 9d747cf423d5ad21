"""Datasets from every kind of place give what datasets' own loaders give."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from sae_lens_multimodal.data.rows import Prompt, SkipReport
from sae_lens_multimodal.data.sources import open_dataset
from sae_lens_multimodal.data.stream import read_prompts
from sae_lens_multimodal.errors import DatasetError
from sae_lens_multimodal.training.prompts import PromptSource
from tests.data.data_samples import png

COLOURS = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (90, 90, 0), (0, 90, 90)]
CAPTIONS = [f"picture {index}" for index in range(len(COLOURS))]


def picture(index: int) -> bytes:
    return png(COLOURS[index], (10 + index, 12))


def dataset() -> datasets.Dataset:
    rows = [{"image": {"bytes": picture(i), "path": None}, "text": CAPTIONS[i]} for i in range(len(COLOURS))]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def parquet(folder: Path) -> str:
    dataset().to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def parquet_pattern(folder: Path) -> str:
    for index in range(len(COLOURS)):
        dataset().select([index]).to_parquet(folder / f"part-{index}.parquet")
    return str(folder / "part-*.parquet")


def parquet_folder(folder: Path) -> str:
    parquet_pattern(folder)
    return str(folder)


def address(folder: Path) -> str:
    return f"file://{parquet(folder)}"


def json_lines(folder: Path) -> str:
    rows = [{"image": picture_file(folder, i), "text": CAPTIONS[i]} for i in range(len(COLOURS))]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "rows.jsonl")


def json_list(folder: Path) -> str:
    rows = [{"image": picture_file(folder, i), "text": CAPTIONS[i]} for i in range(len(COLOURS))]
    (folder / "rows.json").write_text(json.dumps(rows))
    return str(folder / "rows.json")


def compressed(folder: Path) -> str:
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(Path(json_lines(folder)).read_bytes()))
    return str(folder / "rows.jsonl.gz")


def picture_file(folder: Path, index: int) -> str:
    path = folder / f"picture{index}.png"
    path.write_bytes(picture(index))
    return str(path)


def image_folder(folder: Path) -> str:
    lines = []
    for index in range(len(COLOURS)):
        lines.append(json.dumps({"file_name": Path(picture_file(folder, index)).name, "text": CAPTIONS[index]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def tar(path: Path, indices: range, *, nested: bool) -> None:
    with tarfile.open(path, "w") as archive:
        for index in indices:
            text = json.dumps({"caption": CAPTIONS[index], "width": 3}) if nested else CAPTIONS[index]
            for suffix, content in (("png", picture(index)), ("json" if nested else "txt", text.encode())):
                entry = tarfile.TarInfo(f"{index:05}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def shards(folder: Path) -> str:
    tar(folder / "shard-0.tar", range(2), nested=False)
    tar(folder / "shard-1.tar", range(2, 5), nested=False)
    return str(folder / "shard-*.tar")


def shard_folder_with_json(folder: Path) -> str:
    tar(folder / "shard-0.tar", range(4), nested=True)
    tar(folder / "shard-1.tar", range(4, 5), nested=True)
    return str(folder)


def saved(folder: Path) -> str:
    dataset().save_to_disk(folder / "saved")
    return str(folder / "saved")


def saved_splits(folder: Path) -> str:
    splits = datasets.DatasetDict(train=dataset(), test=dataset().select([0]))
    splits.save_to_disk(folder / "saved")
    return str(folder / "saved")


PLACES: list[Callable[[Path], str]] = [
    parquet,
    parquet_pattern,
    parquet_folder,
    address,
    json_lines,
    json_list,
    compressed,
    image_folder,
    shards,
    shard_folder_with_json,
    saved,
    saved_splits,
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def content(prompts: list[Prompt]) -> list[tuple[str, list[Any]]]:
    return [(prompt.text, [(image.size, image.getpixel((0, 0))) for image in prompt.images]) for prompt in prompts]


EXPECTED = [(f"<image> {CAPTIONS[i]}", [((10 + i, 12), COLOURS[i])]) for i in range(len(COLOURS))]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_every_place_gives_the_same_prompts(place: Callable[[Path], str], streaming: bool, tmp_path: Path) -> None:
    opened = open_dataset(place(tmp_path), streaming=streaming)
    assert isinstance(opened, datasets.IterableDataset) == (streaming and "saved" not in place.__name__)
    assert content(list(read_prompts(opened))) == EXPECTED
    assert content(list(read_prompts(opened, skip_rows=3))) == EXPECTED[3:]


def test_a_folder_of_classes_of_pictures_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    for name, index in (("cat", 0), ("dog", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(picture(index))
    own = datasets.load_dataset(str(tmp_path), split="train")
    prompts = list(read_prompts(open_dataset(tmp_path, streaming=False)))
    assert [prompt.extras["label"] for prompt in prompts] == own["label"]
    assert [prompt.images[0].tobytes() for prompt in prompts] == [row["image"].tobytes() for row in own]


@pytest.mark.parametrize("streaming", [True, False])
def test_messages_of_mixed_types_are_read_as_they_were_written(streaming: bool, tmp_path: Path) -> None:
    # OpenAI's content is a string or a list of parts; datasets stores such columns as JSON text.
    url = "data:image/png;base64," + base64.b64encode(picture(1)).decode()
    picture_part = {"type": "image_url", "image_url": {"url": url}}
    rows: list[Any] = [
        [{"role": "user", "content": 'say "hi"'}, {"role": "assistant", "content": "hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "look"}, picture_part]}],
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in rows))
    prompts = list(read_prompts(open_dataset(path, streaming=streaming)))
    assert [prompt.text for prompt in prompts] == ['say "hi"\nhi', "look <image>"]
    assert content(prompts)[1][1] == [((11, 12), COLOURS[1])]


def test_obelics_documents_from_parquet(tmp_path: Path) -> None:
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "texts": datasets.List(datasets.Value("string"))}
    )
    rows = [
        {"images": [None, {"bytes": picture(0), "path": None}, None], "texts": ["one", None, "two"]},
        {"images": [None, None], "texts": ["three", "four"]},
        {"images": [{"bytes": picture(1), "path": None}], "texts": [None]},
        {"images": [], "texts": ["five", "six"]},
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "documents.parquet")
    prompts = list(read_prompts(open_dataset(tmp_path / "documents.parquet")))
    assert [prompt.text for prompt in prompts] == ["one <image> two", "three four", "<image>", "five six"]


def test_a_stream_that_datasets_decodes_in_threads_survives_a_corrupt_picture(
    rows: list[dict[str, Any]], image_dataset: datasets.Dataset
) -> None:
    # load_dataset does so to what it streams from the hub; after skip and take it could not be undone.
    decoding = image_dataset.to_iterable_dataset().decode(True, num_threads=2)
    source = PromptSource.split(decoding, held_out=1)
    report = SkipReport()
    assert [prompt.text for prompt in source.evaluation(1)] == ["<image> row 0"]
    kept = [prompt.text for prompt in source.epoch(0, skip_rows=0, report=report)]
    assert kept == [f"<image> row {index}" for index in (1, 3, 4, 5)]
    assert dict(report.reasons) == {"picture cannot be opened": 1}


def test_files_that_vanish_or_are_damaged_end_in_one_line(tmp_path: Path) -> None:
    parquet_pattern(tmp_path)
    reading = read_prompts(open_dataset(str(tmp_path / "part-*.parquet")))
    next(reading)
    for index in range(1, 5):
        (tmp_path / f"part-{index}.parquet").unlink()
    with pytest.raises(DatasetError, match=r"cannot be read beyond row \d .*FileNotFoundError.*part-"):
        list(reading)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": nonsense\n')
    with pytest.raises(DatasetError, match="JSON parse error"):
        list(read_prompts(open_dataset(tmp_path / "bad.jsonl")))


def test_what_is_no_dataset_says_so(tmp_path: Path) -> None:
    for source, message in (
        (str(tmp_path / "none-*.parquet"), "cannot be opened"),
        ("https://example.com/rows.docx", "expected one of .parquet"),
        (str(tmp_path / "missing.jsonl.gz"), "does not exist"),
    ):
        with pytest.raises(DatasetError, match=message):
            open_dataset(source)


def test_pictures_from_archives_and_encodings_are_the_files_own(tmp_path: Path) -> None:
    # The bytes that are decoded are those that Pillow itself reads.
    opened = list(read_prompts(open_dataset(shards(tmp_path))))
    for index, prompt in enumerate(opened):
        assert prompt.images[0].tobytes() == Image.open(io.BytesIO(picture(index))).tobytes()
