"""Parquet files of a store: written whole and atomically, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.files import write_atomically

_CACHED_ROW_GROUPS = 8


class SortedTable:
    """A Parquet file whose rows ascend by one column; row groups are read when needed and kept for a while."""

    def __init__(self, path: Path, schema: pa.Schema, key: str) -> None:
        if not path.is_file():
            raise StoreError(f"{path} does not exist; the feature store is incomplete: harvest again.")
        self._file = pq.ParquetFile(path)
        if not self._file.schema_arrow.equals(schema):
            missing = [name for name in schema.names if name not in self._file.schema_arrow.names]
            raise StoreError(f"{path} lacks the columns {missing} or has other types; harvest again.")
        self._key = key
        self._firsts, self._lasts = self._bounds()
        self._read = lru_cache(maxsize=_CACHED_ROW_GROUPS)(self._read_group)

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        metadata = self._file.metadata
        column = self._file.schema_arrow.names.index(self._key)
        n_groups = metadata.num_row_groups if metadata.num_rows else 0
        groups = [metadata.row_group(index).column(column).statistics for index in range(n_groups)]
        return np.array([group.min for group in groups]), np.array([group.max for group in groups])

    def _read_group(self, index: int) -> pa.Table:
        return self._file.read_row_group(index)

    def rows(self, key: int | str) -> pa.Table:
        """All rows whose key column holds `key`; an empty table where there are none."""
        first = int(np.searchsorted(self._lasts, key, side="left"))
        last = int(np.searchsorted(self._firsts, key, side="right"))
        parts = [self._read(index) for index in range(first, last)]
        parts = [part.filter(pc.equal(part[self._key], key)) for part in parts]
        return pa.concat_tables(parts) if parts else self._file.schema_arrow.empty_table()

    def column(self, name: str) -> pa.ChunkedArray:
        """One whole column."""
        return self._file.read(columns=[name])[name]


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], *, rows_per_group: int = 1024) -> None:
    """Write the tables, one after the other, as one Parquet file, atomically."""

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for table in tables:
                if not table.num_rows:  # an empty row group has no bounds
                    continue
                writer.write_table(table, row_group_size=rows_per_group)

    write_atomically(path, write)
