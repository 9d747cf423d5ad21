"""The examples that descriptions rest on: of each feature the strongest and some ordinary ones, prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64

from sae_lens_multimodal.features.example import StoredPrompt
from sae_lens_multimodal.features.schema import EXAMPLES, MODALITIES, StorePaths
from sae_lens_multimodal.types import Conversation, Modality

_COLUMNS = ("feature", "kind", "modality", "prompt_id", "max_image", "positions", "values")
REGION_SHARE = 0.5
"""A patch belongs to a region from this share of the strongest activation on."""


@dataclass(frozen=True)
class SampledExample:
    """One feature on one prompt."""

    row: int
    """Place of the feature among those described."""
    modality: int
    """Whose list it is in; 0 image, 1 text."""
    is_top: bool
    max_image: float
    positions: Int64[np.ndarray, "n"]
    values: np.ndarray

    def strongest(self, labels: Int64[np.ndarray, "seq"]) -> int:
        """Position of the strongest token of the list's modality."""
        wanted = Modality.IMAGE.value if MODALITIES[self.modality] == "image" else Modality.TEXT.value
        inside = np.where(labels[self.positions] == wanted, self.values, -1.0)
        return int(self.positions[inside.argmax()])

    def sampled(self, labels: Int64[np.ndarray, "seq"]) -> int:
        """Position of the token that stands for the example: of a top one the strongest, else the middling one."""
        wanted = Modality.IMAGE.value if MODALITIES[self.modality] == "image" else Modality.TEXT.value
        inside = labels[self.positions] == wanted
        order = np.argsort(self.values[inside], kind="stable")
        return int(self.positions[inside][order[-1 if self.is_top else len(order) // 2]])

    def region(self, labels: Int64[np.ndarray, "seq"], image_index: Int64[np.ndarray, "seq"]) -> Int64[np.ndarray, "m"]:
        """Positions of the patches that are lit, in the picture that holds the strongest one."""
        picture = image_index[self.strongest(labels)]
        lit: Bool[np.ndarray, "n"] = (image_index[self.positions] == picture) & (
            labels[self.positions] == Modality.IMAGE.value
        )
        lit &= self.values >= REGION_SHARE * self.values[lit].max()
        return self.positions[lit]


class SampledExamples:
    """The examples of some features, ordered by prompt.

    Memory: that of the examples' firings; `8 * tokens firing in an example + 40` bytes for each of at most
    `4 * n_examples` examples of a feature.

    Args:
        paths: The store.
        features: Which features, ascending.
        n_examples: Of each list, top and ordinary, of each modality, so many.
    """

    def __init__(self, paths: StorePaths, features: Sequence[int], n_examples: int) -> None:
        wanted = pa.array(features, pa.int32())
        table = pa.concat_tables(
            [
                EXAMPLES.empty_table().select(_COLUMNS),
                *(_chosen(part, wanted, n_examples) for part in _parts(paths)),
            ]
        )
        order = pc.sort_indices(table, sort_keys=[("prompt_id", "ascending"), ("feature", "ascending")])
        self._table = table.take(order).combine_chunks()
        self.features = list(features)
        self._features = np.asarray(features)
        ids, start = np.unique(self._table["prompt_id"].to_numpy(), return_index=True)
        self.prompt_ids: list[int] = ids.tolist()
        """Prompts that hold an example, ascending."""
        self._bounds = [*start.tolist(), self._table.num_rows]

    def of(self, place: int) -> Iterator[SampledExample]:
        """The examples of `prompt_ids[place]`."""
        part = self._table.slice(self._bounds[place], self._bounds[place + 1] - self._bounds[place])
        rows = np.searchsorted(self._features, part["feature"].to_numpy()).tolist()
        for row, one in zip(rows, part.to_pylist(), strict=True):
            yield SampledExample(
                row=row,
                modality=MODALITIES.index(one["modality"]),
                is_top=one["kind"] == "top",
                max_image=one["max_image"],
                positions=np.asarray(one["positions"], dtype=np.int64),
                values=np.asarray(one["values"], dtype=np.float32),
            )


def _parts(paths: StorePaths) -> Iterator[pa.Table]:
    for batch in pq.ParquetFile(paths.table("examples")).iter_batches(columns=[*_COLUMNS, "rank"]):
        yield pa.Table.from_batches([batch])


def _chosen(part: pa.Table, features: pa.Array, n_examples: int) -> pa.Table:
    # An ordinary list is ordered by strength: every example of it counts as much as another.
    first = pc.less(part["rank"], n_examples)
    fires = pc.not_equal(part["kind"], "silent")
    held = pc.is_in(part["feature"], value_set=features)
    return part.filter(pc.and_(pc.and_(first, fires), held)).select(_COLUMNS)


def with_pictures(prompt: StoredPrompt) -> Conversation:
    """A stored prompt's messages with its pictures in their places."""
    pictures = iter(prompt.images)
    return [{**message, "content": _opened(message["content"], pictures)} for message in prompt.messages]


def _opened(content: Any, pictures: Iterator[Any]) -> Any:  # noqa: ANN401 - whatever a chat message holds
    if isinstance(content, str):
        return content
    return [{**part, "image": next(pictures)} if part["type"] == "image" else part for part in content]
