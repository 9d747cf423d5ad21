"""Reading the prompts of a dataset one after the other; rows that cannot be used are counted, not fatal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from sae_lens_multimodal.data.rows import Prompt, SkipReport, check_columns, row_to_prompt
from sae_lens_multimodal.data.sources import Rows, open_dataset
from sae_lens_multimodal.errors import ConfigError, DatasetError, ImageError, PromptError

__all__ = ["open_dataset", "read_prompts"]

logger = logging.getLogger(__name__)

_GIVE_UP_AFTER = 1000
"""So many rows may fail in a row from the very first one before the dataset as a whole is refused."""


def read_prompts(
    dataset: Rows,
    *,
    skip_rows: int = 0,
    limit: int | None = None,
    strict: bool = False,
    report: SkipReport | None = None,
    image_folder: str | Path | None = None,
) -> Iterator[Prompt]:
    """Read a dataset's rows as prompts, in order, with the pictures opened.

    A row whose picture is corrupt, or whose parts do not match, is skipped and counted in `report`. The caller's
    dataset is left as it is: neither its format nor its columns change.

    Args:
        dataset: What `open_dataset` returns.
        skip_rows: Rows to leave out at the beginning, to resume; they are not decoded.
        limit: Prompts to yield at most; None for all.
        strict: Raise at the first row that cannot be used rather than skip it.
        report: Filled with what was read, kept and skipped.
        image_folder: Where relative picture paths in the rows begin; the working folder if None.

    Yields:
        The prompts; `Prompt.row` counts from the dataset's beginning.

    Raises:
        DatasetError: no column can be used, there are no rows, or every row failed.
        ConfigError: `skip_rows` or `limit` is negative.
        PromptError, ImageError: a row cannot be used and `strict` is set.
    """
    if skip_rows < 0 or (limit is not None and limit < 0):
        raise ConfigError(f"Got skip_rows={skip_rows} and limit={limit}; expected 0 or more.")
    report = report if report is not None else SkipReport()
    folder = Path(image_folder) if image_folder is not None else None

    def build(row: Mapping[str, Any], index: int) -> Prompt:
        return row_to_prompt(row, index=index, image_folder=folder)

    prompts = _prompts(undecoded_rows(dataset, skip_rows), skip_rows, build, strict=strict, report=report)
    yield from islice(prompts, limit)


def _prompts(
    rows: Iterable[Mapping[str, Any]],
    first: int,
    build: Callable[[Mapping[str, Any], int], Prompt],
    *,
    strict: bool,
    report: SkipReport,
) -> Iterator[Prompt]:
    kept = read = 0
    for index, row in enumerate(rows, start=first):
        read += 1
        report.read += 1
        try:
            prompt = build(row, index)
        except (PromptError, ImageError, DatasetError) as error:
            if strict:
                raise
            report.skip(_reason(error), index, str(error))
            logger.debug("row %d skipped: %s", index, error)
            if not first and not kept and read >= _GIVE_UP_AFTER:
                raise _all_failed(read, report) from error
            continue
        kept += 1
        yield prompt
    if not first and not read:
        raise DatasetError("The dataset has no rows; expected at least one. Check the split and any filter.")
    if not first and not kept:
        raise _all_failed(read, report)


def _reason(error: Exception) -> str:
    if isinstance(error, ImageError):
        return "picture cannot be opened"
    if isinstance(error, DatasetError):
        return "no usable column"
    return "prompt cannot be built"


def _all_failed(read: int, report: SkipReport) -> DatasetError:
    return DatasetError(f"None of the first {read} rows can be used: {report.summary()}.")


def undecoded_rows(dataset: Rows, skip_rows: int = 0) -> Iterator[Mapping[str, Any]]:
    """Iterate over rows with pictures left as bytes and paths, so that a corrupt one cannot end the iteration.

    A transform that the caller set on a dataset (`with_transform`) is honoured: its rows are taken as it makes them.
    """
    if isinstance(dataset, datasets.Dataset):
        yield from _rows_of_dataset(dataset, skip_rows)
    elif isinstance(dataset, datasets.IterableDataset):
        yield from _rows_of_iterable(dataset, skip_rows)
    else:
        if dataset:
            check_columns({key for row in dataset for key in row})
        yield from islice(dataset, skip_rows, None)


def _rows_of_dataset(dataset: datasets.Dataset, skip_rows: int) -> Iterator[Mapping[str, Any]]:
    if skip_rows >= len(dataset):
        return
    remaining = dataset.select(range(skip_rows, len(dataset))) if skip_rows else dataset
    if dataset.format["type"] == "custom":
        yield from _checked(remaining)
        return
    check_columns(dataset.column_names)
    # `with_format` and `to_iterable_dataset` make new objects: the caller's dataset keeps its format.
    yield from remaining.with_format(None).to_iterable_dataset().decode(False)


def _rows_of_iterable(dataset: datasets.IterableDataset, skip_rows: int) -> Iterator[Mapping[str, Any]]:
    plain = dataset.with_format(None)
    # Without known features there is nothing that datasets would decode.
    undecoded = plain.decode(False) if plain.features else plain
    yield from _checked(undecoded.skip(skip_rows) if skip_rows else undecoded)


def _checked(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Pass rows on after a look at the columns of the first."""
    for index, row in enumerate(rows):
        if not index:
            check_columns(row)
        yield row
