"""Iterating over the undecoded rows of a dataset, in its own order or another, from any row on."""

from __future__ import annotations

import copy
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa

from sae_lens_multimodal.data.columns import check_columns
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.errors import DatasetError, MultimodalError

_UNREADABLE = (OSError, ValueError, EOFError, pa.ArrowException, tarfile.TarError, datasets.exceptions.DatasetsError)
"""What datasets and its readers raise when a file is damaged or gone."""


class RawRow(NamedTuple):
    """A row as it lies in its dataset, pictures not decoded."""

    content: Mapping[str, Any]
    """Its columns."""
    number: int
    """Its index in the dataset that it is from: what a person needs to find it."""
    dataset: str | None = None
    """The member of a mixture that it is from."""
    image_folder: Path | None = None
    """Where its relative picture paths begin, where that is the member's own affair."""


@dataclass(frozen=True)
class Ordered:
    """Rows of a dataset that has a length, in another order."""

    rows: datasets.Dataset | Sequence[Mapping[str, Any]]
    """The rows."""
    order: Sequence[int]
    """Which rows, in order."""
    numbers: Sequence[int] | None = None
    """What each of the rows is called when something is wrong with it; None for its index."""

    def __len__(self) -> int:
        """Return how many rows are chosen."""
        return len(self.order)

    def number(self, place: int) -> int:
        """What the row at a place of the order is called."""
        row = self.order[place]
        return row if self.numbers is None else self.numbers[row]


def known_length(rows: Rows | Ordered) -> int | None:
    """How many rows there are; None where only reading all of them would tell."""
    return None if isinstance(rows, datasets.IterableDataset) else len(rows)


def raw_rows(rows: Rows | Ordered, skip_rows: int = 0) -> Iterator[RawRow]:
    """Iterate over rows with pictures left as bytes and paths, so that a corrupt one cannot end the iteration.

    Raises:
        DatasetError: no column can be used, or the dataset cannot be read on.
    """
    position = skip_rows
    try:
        for content in _contents(rows, skip_rows):
            number = rows.number(position) if isinstance(rows, Ordered) else position
            yield RawRow(content, number)
            position += 1
    except MultimodalError:
        raise
    except _UNREADABLE as error:
        raise DatasetError(
            f"The dataset cannot be read beyond row {position} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); check that its files are whole and still there."
        ) from error


def _contents(rows: Rows | Ordered, skip_rows: int) -> Iterator[Mapping[str, Any]]:
    if isinstance(rows, Ordered):
        chosen = rows.order[skip_rows:]
        if isinstance(rows.rows, datasets.Dataset):
            return undecoded_rows(rows.rows.select(chosen, keep_in_memory=True))
        return undecoded_rows([rows.rows[index] for index in chosen])
    return undecoded_rows(rows, skip_rows)


def undecoded_rows(dataset: Rows, skip_rows: int = 0) -> Iterator[Mapping[str, Any]]:
    """Iterate over rows with pictures left as bytes and paths; `raw_rows` tells where each is from as well.

    A transform that the caller set on a dataset (`with_transform`) is honoured: its rows are taken as it makes them.
    """
    if isinstance(dataset, datasets.Dataset):
        yield from _rows_of_dataset(dataset, skip_rows)
    elif isinstance(dataset, datasets.IterableDataset):
        undecoded = without_decoding(dataset)
        yield from _checked(undecoded.skip(skip_rows) if skip_rows else undecoded)
    else:
        if dataset:
            check_columns({key for row in dataset for key in row})
        yield from islice(dataset, skip_rows, None)


def without_decoding(dataset: datasets.IterableDataset) -> datasets.IterableDataset:
    """A streamed dataset whose pictures stay bytes and paths.

    To be used before `skip`, `take` and `shuffle`: what `load_dataset` streams from the hub is decoded by threads that
    cannot be taken out again afterwards.
    """
    plain = dataset.with_format(None)
    if not plain.features:
        # Without known features there is nothing that datasets would decode.
        return plain
    undecoded = plain.decode(False)
    # `decode(False)` leaves JSON as text too, which is how datasets stores messages of mixed types.
    return undecoded.cast(_with_json(undecoded.features))


def _with_json(features: datasets.Features) -> datasets.Features:
    return datasets.Features({name: _json_decoded(copy.deepcopy(feature)) for name, feature in features.items()})


def _json_decoded(feature: Any) -> Any:  # noqa: ANN401 - datasets' features have no common class
    if isinstance(feature, datasets.Json):
        return datasets.Json()
    if isinstance(feature, dict):
        return {name: _json_decoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        feature.feature = _json_decoded(feature.feature)
    return feature


def _rows_of_dataset(dataset: datasets.Dataset, skip_rows: int) -> Iterator[Mapping[str, Any]]:
    if skip_rows >= len(dataset):
        return
    remaining = dataset.select(range(skip_rows, len(dataset))) if skip_rows else dataset
    if dataset.format["type"] == "custom":
        yield from _checked(remaining)
        return
    check_columns(dataset.column_names)
    # `with_format` and `to_iterable_dataset` make new objects: the caller's dataset keeps its format.
    yield from without_decoding(remaining.with_format(None).to_iterable_dataset())


def _checked(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Pass rows on after a look at the columns of the first."""
    for index, row in enumerate(rows):
        if not index:
            check_columns(row)
        yield row
