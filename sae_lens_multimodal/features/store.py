"""A feature store on disk: what every feature responds to, opened for reading."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64
from PIL import Image

from sae_lens_multimodal.errors import FeatureError, SAEMismatchError, StoreError
from sae_lens_multimodal.features.description import Descriptions, FeatureDescription
from sae_lens_multimodal.features.example import Example, StoredPrompt
from sae_lens_multimodal.features.hashing import sae_fingerprint
from sae_lens_multimodal.features.histogram import quantile_of_histogram
from sae_lens_multimodal.features.picture_vectors import PictureVectors
from sae_lens_multimodal.features.pictures import PictureSource
from sae_lens_multimodal.features.records import layout_of_row
from sae_lens_multimodal.features.schema import (
    FIRST_VERSION,
    KINDS,
    MODALITIES,
    PROMPTS,
    SCHEMA_VERSION,
    STATISTICS,
    STORE_KIND,
    TABLES,
    Kind,
    ModalityName,
    StorePaths,
    of_version,
)
from sae_lens_multimodal.features.tables import SortedTable
from sae_lens_multimodal.files import MANIFEST_NAME, read_json, read_manifest

if TYPE_CHECKING:
    from sae_lens import SAE

__all__ = ["Example", "FeatureStore", "StoredPrompt"]

_CACHED_PROMPTS = 256


class FeatureStore:
    """Statistics and examples of every feature of one sparse autoencoder on one dataset.

    The folder's tables are plain Parquet, described in `SCHEMA.md` beside this file; pandas and duckdb read them
    without this package. Reading is lazy: only the statistics are held in memory.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], dataset: object = None) -> None:
        self.paths = StorePaths(folder)
        self.manifest = manifest
        self.statistics: pa.Table = self._read_statistics()
        self._row_of = {feature: row for row, feature in enumerate(self.statistics["feature"].to_pylist())}
        self._examples = SortedTable(self.paths.table("examples"), TABLES["examples"], "feature")
        version = int(manifest["schema_version"])
        self._prompts = SortedTable(self.paths.table("prompts"), of_version(PROMPTS, version), "prompt_id")
        self._dataset = dataset
        self._pictures = PictureSource(self.paths, dataset, version)
        self.descriptions = Descriptions(self.paths) if Descriptions.exist(self.paths) else None
        """What `describe_features` found out; None where it was not run."""
        self.prompt = lru_cache(maxsize=_CACHED_PROMPTS)(self._read_prompt)

    @classmethod
    def open(cls, folder: Path | str, *, dataset: object = None) -> Self:
        """Open a complete store.

        Args:
            folder: The `output` of `harvest`.
            dataset: The dataset that was harvested; needed to see pictures of a store that keeps references only.

        Raises:
            StoreError: the folder is something else, incomplete, or of another schema version.
        """
        folder = Path(folder)
        if StorePaths(folder).progress.is_dir():
            raise StoreError(f"{folder} holds an unfinished harvest; run the same harvest again to complete it.")
        return cls(folder, _manifest(folder), dataset)

    def reopened(self) -> Self:
        """The store as it lies on disk now, with the same dataset."""
        return self.open(self.folder, dataset=self._dataset)

    @property
    def dataset(self) -> object:
        """The dataset that the store was opened with; None without one."""
        return self._dataset

    @property
    def folder(self) -> Path:
        """Where the store lies."""
        return self.paths.folder

    @property
    def settings(self) -> dict[str, Any]:
        """What the harvest was asked for, and what it met, from the manifest."""
        settings: dict[str, Any] = self.manifest["settings"]
        return settings

    @property
    def hook_name(self) -> str:
        """The hook whose activations the sparse autoencoder encoded."""
        return str(self.settings["hook_name"])

    @property
    def d_sae(self) -> int:
        """Width of the sparse autoencoder; the store may hold some of its features only."""
        return int(self.settings["d_sae"])

    @property
    def histogram_edges(self) -> Float64[np.ndarray, "bins+1"]:
        """Edges of the histograms' bins; the first bin also counts what lies below it, the last what lies above."""
        return np.asarray(self.settings["histogram_edges"], dtype=np.float64)

    @cached_property
    def features(self) -> list[int]:
        """Features that fired at least once on an image or text token, ascending."""
        alive = np.asarray(self.statistics["n_prompts"]) > 0
        features: list[int] = np.asarray(self.statistics["feature"])[alive].tolist()
        return features

    @cached_property
    def all_features(self) -> list[int]:
        """All harvested features, those that never fired included, ascending."""
        return list(self._row_of)

    def statistics_of(self, feature: int) -> dict[str, Any]:
        """The row of `statistics` of one feature.

        Raises:
            FeatureError: the store does not hold that feature.
        """
        row: dict[str, Any] = self.statistics.slice(self._row(feature), 1).to_pylist()[0]
        return row

    def description(self, feature: int) -> FeatureDescription | None:
        """What `describe_features` found out about one feature; None where it was not described."""
        return None if self.descriptions is None else self.descriptions.of(operator.index(feature))

    def look_alikes(self, image_ids: Iterable[str]) -> set[str]:
        """Content names of pictures and of the first ones that looked like them, as far as the store knows them."""
        names = set(image_ids)
        return names | {first for name in names if (first := self._pictures.first_like(name)) is not None}

    def _row(self, feature: int) -> int:
        index = operator.index(feature)
        if index not in self._row_of:
            raise FeatureError(
                f"feature {index} is not in {self.folder}; it holds {len(self._row_of)} of {self.d_sae} features "
                f"(see `all_features`)."
            )
        return self._row_of[index]

    def histogram(self, feature: int, modality: ModalityName | None = None) -> Int64[np.ndarray, "bins"]:
        """How many tokens (of one modality) the feature fires on, by activation (see `histogram_edges`)."""
        column = "histogram" if modality is None else f"histogram_{modality}"
        return np.asarray(self.statistics[column][self._row(feature)].as_py(), dtype=np.int64)

    def scale(self, feature: int, modality: ModalityName | None = None, *, quantile: float = 0.99) -> float:
        """Activation below which `quantile` of the firing tokens lie, estimated from the histogram.

        The estimate lies in the right bin (bins are half an octave wide) and never above the maximum; 0 where the
        feature never fires. It is a robust "fully on" for colour scales and for steering.
        """
        column = "max_activation" if modality is None else f"max_{modality}"
        top = float(self.statistics[column][self._row(feature)].as_py())
        return min(top, quantile_of_histogram(self.histogram(feature, modality), self.histogram_edges, quantile))

    def check_sae(self, sae: SAE[Any]) -> None:
        """Refuse an SAE other than the one that was harvested, as far as the store knows which that was.

        Raises:
            SAEMismatchError: the weights differ.
        """
        known = self.settings.get("sae")
        found = sae_fingerprint(list(sae.named_parameters()))
        if known is not None and known != found:
            raise SAEMismatchError(
                f"The feature store is of an SAE with the fingerprint {known}, the one given has {found}; give the SAE "
                "that was harvested, or harvest with this one."
            )

    def examples(
        self, feature: int, kind: Kind = "top", modality: ModalityName | None = None, *, limit: int | None = None
    ) -> list[Example]:
        """Examples of one feature.

        Args:
            feature: Index in the sparse autoencoder.
            kind: `top`: the prompts where it is strongest, strongest first. `ordinary`: prompts drawn evenly over the
                quantiles of its activation, none of them in its top list of that modality, strongest first. `silent`:
                prompts in which it fires on no token of the modality.
            modality: The list made by activations on `image` or on `text` tokens. None: both lists in one, each set of
                pictures once, and none that a stronger kind of either modality holds; of the silent ones only those
                where the feature fires nowhere.
            limit: At most so many.

        Raises:
            FeatureError: the store does not hold that feature.
        """
        self._row(feature)
        rows = self._examples.rows(operator.index(feature)).to_pylist()
        rows = self._both(rows, kind) if modality is None else _ranked(rows, kind, modality)
        return [self._example(row) for row in rows[:limit]]

    def _both(self, rows: Sequence[dict[str, Any]], kind: Kind) -> list[dict[str, Any]]:
        """Merge the image list and the text list of one kind, strongest first."""
        measure = "mean" if self.settings.get("rank") == "mean" else "max"
        stronger = KINDS[: KINDS.index(kind)]
        taken = {row["picture_key"] for row in rows if row["kind"] in stronger}
        merged: dict[int, dict[str, Any]] = {}
        for row in sorted(rows, key=lambda row: -max(row[f"{measure}_{name}"] for name in MODALITIES)):
            if row["kind"] == kind and row["picture_key"] not in taken:
                merged.setdefault(row["picture_key"], row)
        return [row for row in merged.values() if kind != "silent" or not (row["max_image"] or row["max_text"])]

    def _example(self, row: dict[str, Any]) -> Example:
        return Example(
            feature=row["feature"],
            kind=row["kind"],
            modality=row["modality"],
            rank=row["rank"],
            quantile=row["quantile"],
            max_image=row["max_image"],
            max_text=row["max_text"],
            mean_image=row["mean_image"],
            mean_text=row["mean_text"],
            positions=np.asarray(row["positions"], dtype=np.int64),
            values=np.asarray(row["values"], dtype=np.float32),
            prompt=self.prompt(row["prompt_id"]),
        )

    @cached_property
    def prompt_ids(self) -> list[int]:
        """Prompts that some example refers to, ascending."""
        ids: list[int] = self._prompts.column("prompt_id").to_pylist()
        return ids

    def _read_prompt(self, prompt_id: int) -> StoredPrompt:
        """One stored prompt.

        Raises:
            StoreError: no example of the store refers to that prompt.
        """
        rows = self._prompts.rows(prompt_id).to_pylist()
        if not rows:
            raise StoreError(f"prompt {prompt_id} is not in {self.folder}; only prompts that serve as examples are.")
        row = rows[0]
        return StoredPrompt(
            prompt_id=prompt_id,
            messages_json=row["messages"],
            tokens=row["tokens"],
            layout=layout_of_row(row),
            image_ids=row["image_ids"],
            open_image=self.image,
            near_ids=row.get("near_ids", row["image_ids"]),
        )

    def image(self, image_id: str) -> Image.Image:
        """One picture by its content name, RGB.

        Raises:
            StoreError: the store holds no such picture, or references only and was opened without the dataset.
        """
        return self._pictures.open(image_id)

    def image_path(self, image_id: str) -> Path | None:
        """The PNG file of a picture; None in a store that keeps references only."""
        return self._pictures.path(image_id)

    @cached_property
    def image_ids(self) -> list[str]:
        """Content names of all pictures, ascending."""
        return self._pictures.names()

    @cached_property
    def picture_vectors(self) -> PictureVectors | None:
        """Vectors of regions of the pictures, by the model's vision tower; None if `describe_features` wrote none."""
        known = self.descriptions is not None and self.descriptions.settings.get("picture_cells") is not None
        return PictureVectors(self.paths.picture_vectors, self.image_ids) if known else None

    def _read_statistics(self) -> pa.Table:
        return self._read_whole("statistics", STATISTICS)

    def _read_whole(self, name: str, schema: pa.Schema) -> pa.Table:
        path = self.paths.table(name)
        if not path.is_file():
            raise StoreError(f"{path} does not exist; the feature store is incomplete: harvest again.")
        table = pq.read_table(path)
        if not table.schema.equals(schema):
            raise StoreError(f"{path} has other columns or types than this version of the package reads.")
        return table


def _manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a store of this version or of the first."""
    path = folder / MANIFEST_NAME
    known = read_json(path) if path.is_file() else {}
    is_first = isinstance(known, dict) and known.get("schema_version") == FIRST_VERSION
    return read_manifest(folder, kind=STORE_KIND, schema_version=FIRST_VERSION if is_first else SCHEMA_VERSION)


def _ranked(rows: Sequence[dict[str, Any]], kind: Kind, modality: ModalityName) -> list[dict[str, Any]]:
    """The rows of one list, in its order."""
    return sorted((row for row in rows if (row["kind"], row["modality"]) == (kind, modality)), key=itemgetter("rank"))
