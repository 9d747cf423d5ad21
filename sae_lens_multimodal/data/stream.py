"""Reading the prompts of a dataset one after the other; rows that cannot be used are counted, not fatal."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from sae_lens_multimodal.data.mixture import Mixture
from sae_lens_multimodal.data.raw import Ordered, RawRow, raw_rows, undecoded_rows
from sae_lens_multimodal.data.rows import Prompt, SkipReport, row_to_prompt
from sae_lens_multimodal.data.sources import Rows, open_dataset
from sae_lens_multimodal.errors import ConfigError, DatasetError, ImageError, PromptError

__all__ = ["Readable", "open_dataset", "read_prompts", "undecoded_rows"]

logger = logging.getLogger(__name__)

Readable: TypeAlias = "Rows | Ordered | Mixture"
"""What prompts can be read from."""

_GIVE_UP_AFTER = 1000
"""So many rows may fail in a row from the very first one before the dataset as a whole is refused."""


@dataclass(frozen=True)
class SkippedRow:
    """A row that is no prompt, and why."""

    row: int
    """Its place in the order of reading."""
    number: int
    """Its index where it is from."""
    dataset: str | None
    """The member of a mixture that it is from."""
    error: PromptError | ImageError | DatasetError
    """What is wrong with it."""

    @property
    def reason(self) -> str:
        """In one of few words, what is wrong with it."""
        if isinstance(self.error, ImageError):
            return "picture cannot be opened"
        if isinstance(self.error, DatasetError):
            return "no usable column"
        return "prompt cannot be built"

    def count_in(self, report: SkipReport) -> None:
        """Count it as skipped."""
        report.skip(self.reason, self.number, in_dataset(self.dataset, str(self.error)))


def read_prompts(
    dataset: Readable,
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
        dataset: What `open_dataset` returns, or a mixture.
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
    check_range(skip_rows, limit)
    report = report if report is not None else SkipReport()
    folder = Path(image_folder) if image_folder is not None else None
    results = (build_prompt(place, raw, folder) for place, raw in numbered_rows(dataset, skip_rows))

    def kept() -> Iterator[Prompt]:
        for result in watched(results, whole=not skip_rows, strict=strict):
            report.read += 1
            if isinstance(result, Prompt):
                yield result
            else:
                result.count_in(report)

    yield from islice(kept(), limit)


def check_range(skip_rows: int, limit: int | None) -> None:
    """Refuse negative numbers of rows.

    Raises:
        ConfigError: one is negative.
    """
    if skip_rows < 0 or (limit is not None and limit < 0):
        raise ConfigError(f"Got skip_rows={skip_rows} and limit={limit}; expected 0 or more.")


def numbered_rows(dataset: Readable, skip_rows: int) -> Iterator[tuple[int, RawRow]]:
    """Undecoded rows with their places in the order of reading."""
    rows = dataset.raw_rows(skip_rows) if isinstance(dataset, Mixture) else raw_rows(dataset, skip_rows)
    return enumerate(rows, start=skip_rows)


def build_prompt(place: int, raw: RawRow, image_folder: Path | None) -> Prompt | SkippedRow:
    """Turn an undecoded row into a prompt with its pictures opened, or say why it cannot be one."""
    folder = raw.image_folder if raw.image_folder is not None else image_folder
    try:
        prompt = row_to_prompt(raw.content, index=place, image_folder=folder)
    except (PromptError, ImageError, DatasetError) as error:
        logger.debug("row %d skipped: %s", raw.number, error)
        return SkippedRow(place, raw.number, raw.dataset, error)
    if raw.number == place and raw.dataset is None:
        return prompt
    return replace(prompt, number=raw.number, dataset=raw.dataset)


def watched(results: Iterable[Prompt | SkippedRow], *, whole: bool, strict: bool) -> Iterator[Prompt | SkippedRow]:
    """Pass results on, and stop where a dataset is of no use at all, or at the first bad row if `strict`.

    Args:
        results: Prompts and rows that are none, in order.
        whole: Whether they begin with the dataset's first row; a run that resumes may rightly find nothing more.
        strict: Whether a row that is no prompt is an error.
    """
    report = SkipReport()
    for result in results:
        report.read += 1
        if isinstance(result, SkippedRow):
            if strict:
                raise located(result.error, result.number, result.dataset) from result.error
            result.count_in(report)
        yield result
        if whole and not report.kept and report.read >= _GIVE_UP_AFTER:
            raise _all_failed(report)
    if whole and not report.read:
        raise DatasetError("The dataset has no rows; expected at least one. Check the split and any filter.")
    if whole and not report.kept:
        raise _all_failed(report)


def located(
    error: PromptError | ImageError | DatasetError, number: int, dataset: str | None
) -> PromptError | ImageError | DatasetError:
    """The error with the row that it is about."""
    return type(error)(f"row {number}: {in_dataset(dataset, str(error))}")


def in_dataset(dataset: str | None, message: str) -> str:
    """A message with the name of the dataset that it is about, where there are several."""
    return message if dataset is None else f"{dataset}: {message}"


def _all_failed(report: SkipReport) -> DatasetError:
    return DatasetError(f"None of the first {report.read} rows can be used: {report.summary()}.")
