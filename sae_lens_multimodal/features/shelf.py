"""The prompts and pictures that examples refer to, kept on disk while a pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from sae_lens_multimodal.features.pictures import keep_picture
from sae_lens_multimodal.features.records import PromptRow, prompts_table
from sae_lens_multimodal.features.schema import IMAGES, PROMPTS, StorePaths
from sae_lens_multimodal.features.tables import write_tables

PROMPTS_PER_GROUP = 32
"""Prompts of a thousand tokens and more are read a few at a time."""
_SLACK_PROMPTS = 256

MakeRow: TypeAlias = Callable[[], PromptRow]


class PromptShelf:
    """Prompts wait in memory until the next `flush`, which writes those still referred to as one more shard.

    Many are evicted again before that, so few pictures are written in vain. Shards are rewritten once more than half
    of their prompts are of no use any more. Nothing that a checkpoint names is removed before the next checkpoint.
    """

    def __init__(self, paths: StorePaths, *, keep_pictures: bool, shards: Sequence[str] = ()) -> None:
        self._paths = paths
        self._keep_pictures = keep_pictures
        self._pending: dict[int, tuple[MakeRow, list[Image.Image]]] = {}
        self.shards = list(shards)
        self._next = 1 + max((int(name.split("-")[1].split(".")[0]) for name in shards), default=-1)
        self._rows = sum(pq.read_metadata(paths.progress / name).num_rows for name in shards)
        self._swept = False

    def add(self, prompt_id: int, make_row: MakeRow, images: Sequence[Image.Image]) -> None:
        """Put one prompt on the shelf; ids ascend. Its row is made only if it is still wanted at the next flush."""
        self._pending[prompt_id] = (make_row, list(images))

    def flush(self, live: Sequence[int]) -> None:
        """Write what waits and is in `live`; the rest is dropped."""
        wanted = set(live)
        rows = []
        for prompt_id, (make_row, images) in self._pending.items():
            if prompt_id in wanted:
                rows.append(make_row())
                self._keep(rows[-1], images)
        self._pending.clear()
        if rows:
            self._write([prompts_table(rows)])
            self._rows += len(rows)
        if self._rows > 2 * len(wanted) + _SLACK_PROMPTS:
            self._sweep(wanted)

    def _keep(self, row: PromptRow, images: Iterable[Image.Image]) -> None:
        if self._keep_pictures:
            for name, picture in zip(row["image_ids"], images, strict=True):
                keep_picture(self._paths, name, picture)

    def _write(self, tables: Iterable[pa.Table]) -> None:
        name = f"prompts-{self._next:06d}.parquet"
        write_tables(self._paths.progress / name, PROMPTS, tables, rows_per_group=PROMPTS_PER_GROUP)
        self.shards.append(name)
        self._next += 1

    def _sweep(self, live: set[int]) -> None:
        old, self.shards = self.shards, []
        self._write(_rows_of(self._paths.progress, old, live))
        self._rows = pq.read_metadata(self._paths.progress / self.shards[0]).num_rows
        self._swept = True

    def remove_unused(self) -> None:
        """Delete what a sweep left over, pictures included; to be called after a checkpoint."""
        if not self._swept:
            return
        for path in self._paths.progress.glob("prompts-*.parquet"):
            if path.name not in self.shards:
                path.unlink()
        named: set[str] = set()
        for name in self.shards:
            ids = pq.read_table(self._paths.progress / name, columns=["image_ids"])["image_ids"]
            named.update(pc.list_flatten(ids).to_pylist())
        _remove_pictures(self._paths, named)
        self._swept = False

    def finish(self, used: Sequence[int]) -> None:
        """Write the prompts and images tables of the finished store, and delete all other pictures.

        Args:
            used: Prompts that some example refers to.
        """
        pictures: dict[str, dict[str, Any]] = {}

        def noted() -> Iterator[pa.Table]:
            for table in _rows_of(self._paths.progress, self.shards, set(used)):
                self._note_pictures(table, pictures)
                yield table

        write_tables(self._paths.table("prompts"), PROMPTS, noted(), rows_per_group=PROMPTS_PER_GROUP)
        rows = [pictures[name] for name in sorted(pictures)]
        write_tables(self._paths.table("images"), IMAGES, [pa.Table.from_pylist(rows, schema=IMAGES)])
        _remove_pictures(self._paths, pictures)

    def _note_pictures(self, prompts: pa.Table, pictures: dict[str, dict[str, Any]]) -> None:
        columns = ["image_ids", "image_widths", "image_heights", "near_ids"]
        for row in prompts.select(["prompt_id", *columns]).to_pylist():
            for index, (name, width, height, near) in enumerate(zip(*(row[c] for c in columns), strict=True)):
                file = self._paths.image_file(name) if self._keep_pictures else None
                picture = {"image_id": name, "file": file, "width": width, "height": height, "near_id": near}
                pictures.setdefault(name, {**picture, "prompt_id": row["prompt_id"], "index": index})


def _rows_of(folder: Path, shards: Iterable[str], wanted: set[int]) -> Iterator[pa.Table]:
    ids = pa.array(np.fromiter(sorted(wanted), dtype=np.int64, count=len(wanted)))
    for name in shards:
        for batch in pq.ParquetFile(folder / name).iter_batches(batch_size=PROMPTS_PER_GROUP):
            table = pa.Table.from_batches([batch])
            yield table.filter(pc.is_in(table["prompt_id"], value_set=ids)).cast(PROMPTS)


def _remove_pictures(paths: StorePaths, named: Iterable[str]) -> None:
    kept = set(named)
    for path in paths.images.glob("*/*.png"):
        if path.stem not in kept:
            path.unlink()
