"""Pictures of a store: kept as PNG files by content, or reopened from the dataset they came from."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from sae_lens_multimodal.data.stream import read_prompts
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.features.hashing import image_id as name_of
from sae_lens_multimodal.features.schema import IMAGES, StorePaths, of_version
from sae_lens_multimodal.features.tables import SortedTable
from sae_lens_multimodal.files import write_bytes

_CACHED_PICTURES = 64
_PNG_EFFORT = 3


def keep_picture(paths: StorePaths, image_id: str, picture: Image.Image) -> None:
    """Write a picture as a PNG file under its content name, unless it is there."""
    path = paths.folder / paths.image_file(image_id)
    if path.exists():
        return
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="PNG", compress_level=_PNG_EFFORT)
    write_bytes(path, buffer.getvalue())


class PictureSource:
    """Opens pictures by their content names."""

    def __init__(self, paths: StorePaths, dataset: object, version: int) -> None:
        self._paths = paths
        self._dataset = dataset
        self._table = SortedTable(paths.table("images"), of_version(IMAGES, version), "image_id")
        self.open = lru_cache(maxsize=_CACHED_PICTURES)(self._open)

    def names(self) -> list[str]:
        """Content names of all pictures, ascending."""
        names: list[str] = self._table.column("image_id").to_pylist()
        return names

    def path(self, image_id: str) -> Path | None:
        """The picture's file; None where only a reference was kept."""
        file: str | None = self._row(image_id)["file"]
        return None if file is None else self._paths.folder / file

    def first_like(self, image_id: str) -> str | None:
        """Content name of the first picture that looked like one; None where the store does not hold it."""
        rows = self._table.rows(image_id).to_pylist()
        return rows[0].get("near_id", image_id) if rows else None

    def _row(self, image_id: str) -> dict[str, Any]:
        rows: list[dict[str, Any]] = self._table.rows(image_id).to_pylist()
        if not rows:
            raise StoreError(f"picture {image_id!r} is not in {self._paths.folder}; see images.parquet for its names.")
        return rows[0]

    def _open(self, image_id: str) -> Image.Image:
        path = self.path(image_id)
        if path is None:
            return self._reopen(image_id)
        if not path.is_file():
            raise StoreError(f"{path} does not exist, though images.parquet names it; harvest again.")
        with Image.open(path) as picture:
            return picture.convert("RGB")

    def _reopen(self, image_id: str) -> Image.Image:
        """Read the picture from the dataset, and check that it is the one that was seen."""
        if self._dataset is None:
            raise StoreError(
                f"{self._paths.folder} keeps references to pictures only; open it with the dataset that was harvested: "
                "FeatureStore.open(folder, dataset=...)."
            )
        row = self._row(image_id)
        prompt_id, index = row["prompt_id"], row["index"]
        for prompt in read_prompts(self._dataset, skip_rows=prompt_id, limit=1):
            if prompt.row == prompt_id and index < len(prompt.images):
                picture: Image.Image = prompt.images[index].convert("RGB")
                if name_of(picture) == image_id:
                    return picture
        raise StoreError(
            f"row {prompt_id} of the given dataset does not hold picture {image_id!r}; give the dataset (and split and "
            "order) that was harvested."
        )
