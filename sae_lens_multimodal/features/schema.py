"""The tables of a feature store: names of its files, columns of each, and the kinds of examples."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

import pyarrow as pa

STORE_KIND: Final = "feature-store"
DESCRIBED_KIND: Final = "described-features"
DESCRIBED_VERSION: Final = 1
PROGRESS_KIND: Final = "feature-store-in-progress"
SCHEMA_VERSION: Final = 2
FIRST_VERSION: Final = 1
"""Stores of this version do not know which pictures look alike, and are still read."""

Kind: TypeAlias = Literal["top", "ordinary", "silent"]
ModalityName: TypeAlias = Literal["image", "text"]
KINDS: Final[tuple[Kind, ...]] = ("top", "ordinary", "silent")
MODALITIES: Final[tuple[ModalityName, ...]] = ("image", "text")
"""Order of the modality axis in every tensor of this sub-package."""

STATISTICS: Final = pa.schema(
    [
        pa.field("feature", pa.int32(), nullable=False),
        pa.field("density", pa.float64()),
        pa.field("density_image", pa.float64()),
        pa.field("density_text", pa.float64()),
        pa.field("mean_image", pa.float64()),
        pa.field("mean_text", pa.float64()),
        pa.field("mean_active_image", pa.float64()),
        pa.field("mean_active_text", pa.float64()),
        pa.field("max_activation", pa.float32()),
        pa.field("max_image", pa.float32()),
        pa.field("max_text", pa.float32()),
        pa.field("modality_score", pa.float64()),
        pa.field("n_active_image", pa.int64()),
        pa.field("n_active_text", pa.int64()),
        pa.field("n_prompts", pa.int64()),
        pa.field("n_prompts_image", pa.int64()),
        pa.field("n_prompts_text", pa.int64()),
        pa.field("histogram", pa.list_(pa.int64())),
        pa.field("histogram_image", pa.list_(pa.int64())),
        pa.field("histogram_text", pa.list_(pa.int64())),
    ]
)

EXAMPLES: Final = pa.schema(
    [
        pa.field("feature", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("prompt_id", pa.int64(), nullable=False),
        pa.field("picture_key", pa.int64(), nullable=False),
        pa.field("quantile", pa.float32()),
        pa.field("max_image", pa.float32()),
        pa.field("max_text", pa.float32()),
        pa.field("mean_image", pa.float32()),
        pa.field("mean_text", pa.float32()),
        pa.field("positions", pa.list_(pa.int32())),
        pa.field("values", pa.list_(pa.float32())),
    ]
)

PROMPTS: Final = pa.schema(
    [
        pa.field("prompt_id", pa.int64(), nullable=False),
        pa.field("messages", pa.string()),
        pa.field("tokens", pa.list_(pa.string())),
        pa.field("modality", pa.list_(pa.int8())),
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        pa.field("image_index", pa.list_(pa.int16())),
        pa.field("tile", pa.list_(pa.int16())),
        pa.field("image_widths", pa.list_(pa.int32())),
        pa.field("image_heights", pa.list_(pa.int32())),
        pa.field("image_ids", pa.list_(pa.string())),
        pa.field("near_ids", pa.list_(pa.string())),
    ]
)

IMAGES: Final = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("file", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("prompt_id", pa.int64()),
        pa.field("index", pa.int32()),
        pa.field("near_id", pa.string()),
    ]
)

DESCRIBED: Final = pa.schema(
    [
        pa.field("feature", pa.int32(), nullable=False),
        pa.field("monosemanticity", pa.float64()),
        pa.field("n_crops", pa.int32()),
        pa.field("cross_modal", pa.float64()),
        pa.field("cross_modal_floor", pa.float64()),
        pa.field("n_tokens", pa.int32()),
        pa.field("cofiring", pa.list_(pa.int32())),
        pa.field("cofiring_share", pa.list_(pa.float32())),
        pa.field("cofiring_lift", pa.list_(pa.float32())),
        pa.field("neighbours", pa.list_(pa.int32())),
        pa.field("neighbour_cosine", pa.list_(pa.float32())),
        pa.field("neighbour_given", pa.list_(pa.float32())),
        pa.field("neighbour_covers", pa.list_(pa.float32())),
        pa.field("neighbour_relation", pa.list_(pa.string())),
        pa.field("writes", pa.list_(pa.string())),
        pa.field("writes_logit", pa.list_(pa.float32())),
    ]
)
"""Of `described/features.parquet`, which a store has once its features were described."""

_SINCE_FIRST: Final = frozenset({"near_id", "near_ids"})


def of_version(schema: pa.Schema, version: int) -> pa.Schema:
    """A table's columns in a store of some version."""
    if version != FIRST_VERSION:
        return schema
    return pa.schema([column for column in schema if column.name not in _SINCE_FIRST])


TABLES: Final = {"statistics": STATISTICS, "examples": EXAMPLES, "prompts": PROMPTS, "images": IMAGES}


class StorePaths(NamedTuple):
    """Where everything of one feature store lies."""

    folder: Path

    def table(self, name: str) -> Path:
        """The Parquet file of one of `TABLES`."""
        return self.folder / f"{name}.parquet"

    @property
    def images(self) -> Path:
        """Folder of the kept pictures."""
        return self.folder / "images"

    @property
    def progress(self) -> Path:
        """Folder of an unfinished pass; removed when the store is complete."""
        return self.folder / "progress"

    @property
    def described(self) -> Path:
        """Folder of what was found out about features after the pass."""
        return self.folder / "described"

    @property
    def picture_vectors(self) -> Path:
        """Folder of what the vision tower makes of the pictures."""
        return self.described / "pictures"

    @staticmethod
    def image_file(image_id: str) -> str:
        """A kept picture's file, relative to the store."""
        return f"images/{image_id[:2]}/{image_id}.png"
