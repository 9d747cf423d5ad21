"""Opening a dataset, wherever it lies: the hub, a folder, a file, or memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from sae_lens_multimodal.errors import DatasetError

Rows: TypeAlias = "datasets.Dataset | datasets.IterableDataset | Sequence[Mapping[str, Any]]"
"""A dataset once opened: a datasets object, or a plain list of rows."""

_BUILDERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".tgz": "webdataset",
}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_SAVED_MARKS = ("state.json", "dataset_dict.json")


def open_dataset(
    source: str | Path | Rows | datasets.DatasetDict | datasets.IterableDatasetDict,
    *,
    split: str = "train",
    streaming: bool = True,
    subset: str | None = None,
) -> Rows:
    """Open a dataset of prompts.

    Args:
        source: A name on the hub; a folder written by `save_to_disk`, of pictures (`imagefolder`, with or without a
            `metadata.jsonl`), of webdataset shards or of other data files; a Parquet, JSON, JSON lines, CSV, Arrow or
            webdataset file, also compressed; a pattern of such files (`shards/*.tar`); an address of one that fsspec
            understands (`hf://`, `https://`, `s3://`); a datasets object; or a plain list of rows.
        split: The split to take, where there are several.
        streaming: Whether to read the hub and data files as they are needed, without preparing a local copy. Folders
            written by `save_to_disk` are always read from where they are, and keep their length.
        subset: The configuration of a hub dataset that has several.

    Raises:
        DatasetError: the dataset does not exist, cannot be read, or has no such split.
    """
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        return _take_split(source, split)
    if isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return source
    if isinstance(source, str | Path):
        return _open_path(source, split=split, streaming=streaming, subset=subset)
    return _checked_rows(source)


def _checked_rows(source: object) -> Sequence[Mapping[str, Any]]:
    rows: Sequence[Mapping[str, Any]] | None = None
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        rows = source
    elif isinstance(source, Iterable) and not isinstance(source, str | bytes | Mapping):
        rows = list(source)
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        raise DatasetError(
            f"Got a dataset of type {type(source).__name__}; expected a name, a path, a datasets object or a list of "
            "mappings, one per row."
        )
    return rows


def _open_path(source: str | Path, *, split: str, streaming: bool, subset: str | None) -> Rows:
    path = Path(source).expanduser()
    try:
        if path.is_dir() and any((path / mark).is_file() for mark in _SAVED_MARKS):
            saved = datasets.load_from_disk(str(path))
            return _take_split(saved, split) if isinstance(saved, datasets.DatasetDict) else saved
        if path.is_file():
            return _open_files(str(path), streaming=streaming)
        if not path.exists() and _is_pattern_or_address(str(source)):
            return _open_files(str(source if "://" in str(source) else path), streaming=streaming)
        if not path.exists() and _looks_like_path(source):
            raise DatasetError(f"{source} does not exist; expected a dataset file or folder there, or a hub name.")
        name = str(path) if path.exists() else str(source)
        return datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"The dataset {source} cannot be opened ({_one_line(error)}).") from error


def _open_files(files: str, *, streaming: bool) -> Rows:
    suffix = _suffix(files)
    if suffix not in _BUILDERS:
        raise DatasetError(f"Got the file {files}; expected one of {', '.join(_BUILDERS)}, a folder or a hub name.")
    return datasets.load_dataset(_BUILDERS[suffix], data_files=files, split="train", streaming=streaming)


def _suffix(files: str) -> str:
    """What a file is, compression left aside."""
    suffixes = [suffix.lower() for suffix in Path(files).suffixes]
    while len(suffixes) > 1 and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _is_pattern_or_address(source: str) -> bool:
    return "://" in source or any(mark in source for mark in "*?[")


def _looks_like_path(source: str | Path) -> bool:
    text = str(source)
    return isinstance(source, Path) or text.startswith((".", "/", "~")) or _suffix(text) in _BUILDERS


def _take_split(splits: Mapping[str, Rows], split: str) -> Rows:
    if split not in splits:
        raise DatasetError(f"The dataset has no split {split!r}; it has {', '.join(map(str, splits))}.")
    return splits[split]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
