"""Writing a feature store from prompts and examples at hand: small stores of one's own, and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from PIL import Image

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.errors import FeatureError, StoreError
from sae_lens_multimodal.features.hashing import image_id, picture_key
from sae_lens_multimodal.features.histogram import N_BINS, histogram_bins, histogram_edges
from sae_lens_multimodal.features.pictures import keep_picture
from sae_lens_multimodal.features.records import PromptRow, prompt_row, prompts_table
from sae_lens_multimodal.features.schema import (
    EXAMPLES,
    IMAGES,
    KINDS,
    MODALITIES,
    PROMPTS,
    SCHEMA_VERSION,
    STORE_KIND,
    Kind,
    ModalityName,
    StorePaths,
)
from sae_lens_multimodal.features.statistics import statistics_table
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.tables import write_tables
from sae_lens_multimodal.files import write_manifest
from sae_lens_multimodal.types import Conversation, Modality

_MODALITY_OF = {"image": Modality.IMAGE, "text": Modality.TEXT}


class StoreWriter:
    """Collects prompts and examples in memory and writes them as a `FeatureStore`.

    `harvest` is what makes stores of whole datasets. This is for few examples that one has chosen oneself:

        writer = StoreWriter(folder, d_sae=16)
        writer.add_prompt(0, tokens=tokens, layout=layout, images=[picture])
        writer.add_example(3, prompt_id=0, activations=activations)
        store = writer.finish()

    Statistics are those of the added examples over all the added prompts.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        d_sae: int,
        hook_name: str = "blocks.0.hook_resid_post",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.paths = StorePaths(Path(folder))
        if self.paths.folder.is_dir() and any(self.paths.folder.iterdir()):
            raise StoreError(f"{folder} is not empty; give a new folder to write a feature store into.")
        self._settings = {"model_name": None, "hook_name": hook_name, "d_sae": d_sae, "rank": "max", **(settings or {})}
        self._prompts: dict[int, PromptRow] = {}
        self._images: dict[str, dict[str, Any]] = {}
        self._examples: list[dict[str, Any]] = []
        self._seen: dict[tuple[int, int], Float[np.ndarray, "seq"]] = {}

    def add_prompt(
        self,
        prompt_id: int,
        *,
        tokens: Sequence[str],
        layout: TokenLayout,
        images: Sequence[Image.Image] = (),
        messages: Conversation | None = None,
    ) -> None:
        """Add a prompt that examples may refer to.

        Args:
            prompt_id: A number of one's choice, at least 0; in a harvested store the row in the dataset.
            tokens: Every token as text.
            layout: Of this prompt alone, without padding.
            images: Its pictures, in order.
            messages: Chat messages; without them the pictures followed by the joined text tokens stand in.
        """
        names = [image_id(picture) for picture in images]
        for index, (name, picture) in enumerate(zip(names, images, strict=True)):
            keep_picture(self.paths, name, picture)
            self._images.setdefault(
                name,
                {
                    "image_id": name,
                    "file": self.paths.image_file(name),
                    "width": picture.width,
                    "height": picture.height,
                    "prompt_id": prompt_id,
                    "index": index,
                    "near_id": name,
                },
            )
        if len(tokens) != layout.n_tokens:
            raise StoreError(
                f"prompt {prompt_id} has {len(tokens)} tokens but a layout of {layout.n_tokens}; give one string for "
                "every position."
            )
        if messages is None:
            text = " ".join(t for t, is_text in zip(tokens, layout.is_text[0].tolist(), strict=True) if is_text)
            content = [{"type": "image"} for _ in names] + [{"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
        self._prompts[prompt_id] = prompt_row(prompt_id, tokens, layout, names, messages)

    def add_example(
        self,
        feature: int,
        *,
        prompt_id: int,
        activations: Float[np.ndarray, "seq"],
        kind: Kind = "top",
        modality: ModalityName = "image",
        rank: int | None = None,
        quantile: float | None = None,
    ) -> None:
        """Add one feature's activations over an added prompt to one of its lists.

        Args:
            feature: Index in the sparse autoencoder.
            prompt_id: The prompt.
            activations: Of every token; those on newline, special and padding tokens are dropped.
            kind: The list.
            modality: The list's modality.
            rank: Place in the list; by default the next one.
            quantile: Of an ordinary example, see `Example.quantile`.
        """
        if not 0 <= feature < self._settings["d_sae"]:
            raise FeatureError(f"feature {feature} is outside of 0..{self._settings['d_sae'] - 1}.")
        if prompt_id not in self._prompts:
            raise StoreError(f"prompt {prompt_id} was not added; call add_prompt first.")
        labels = np.asarray(self._prompts[prompt_id]["modality"])
        values = np.where(
            np.isin(labels, [Modality.IMAGE.value, Modality.TEXT.value]), np.asarray(activations, dtype=np.float32), 0
        )
        positions = np.flatnonzero(values > 0)
        earlier = [e for e in self._examples if (e["feature"], e["kind"], e["modality"]) == (feature, kind, modality)]
        example = {
            "feature": feature,
            "kind": kind,
            "modality": modality,
            "rank": len(earlier) if rank is None else rank,
            "prompt_id": prompt_id,
            "picture_key": picture_key(self._prompts[prompt_id]["image_ids"], self._prompts[prompt_id]["tokens"]),
            "quantile": quantile,
            "positions": positions.astype(np.int32),
            "values": values[positions].astype(np.float32),
        }
        for name, label in _MODALITY_OF.items():
            inside = values[labels == label.value]
            example[f"max_{name}"] = float(inside.max(initial=0.0))
            example[f"mean_{name}"] = float(inside.mean()) if inside.size else 0.0
        self._examples.append(example)
        self._seen[feature, prompt_id] = values

    def finish(self) -> FeatureStore:
        """Write the tables and the manifest, and open the store."""
        order = {(kind, name): (i, j) for i, kind in enumerate(KINDS) for j, name in enumerate(MODALITIES)}
        rows = sorted(self._examples, key=lambda e: (e["feature"], *order[e["kind"], e["modality"]], e["rank"]))
        prompts = prompts_table([self._prompts[prompt_id] for prompt_id in sorted(self._prompts)])
        images = [self._images[name] for name in sorted(self._images)]
        write_tables(self.paths.table("examples"), EXAMPLES, [pa.Table.from_pylist(rows, schema=EXAMPLES)])
        write_tables(self.paths.table("prompts"), PROMPTS, [prompts])
        write_tables(self.paths.table("images"), IMAGES, [pa.Table.from_pylist(images, schema=IMAGES)])
        statistics = self._statistics()
        write_tables(self.paths.table("statistics"), statistics.schema, [statistics])
        settings = {**self._settings, "n_tokens": self._n_tokens(), "histogram_edges": histogram_edges().tolist()}
        write_manifest(self.paths.folder, kind=STORE_KIND, schema_version=SCHEMA_VERSION, settings=settings)
        return FeatureStore.open(self.paths.folder)

    def _n_tokens(self) -> dict[str, int]:
        labels = [np.asarray(row["modality"]) for row in self._prompts.values()]
        return {name: int(sum((row == label.value).sum() for row in labels)) for name, label in _MODALITY_OF.items()}

    def _statistics(self) -> pa.Table:
        features = sorted({feature for feature, _ in self._seen})
        row_of = {feature: row for row, feature in enumerate(features)}
        shape = (len(MODALITIES), len(features))
        active, total, peak = (np.zeros(shape, dtype=kind) for kind in (np.int64, np.float64, np.float32))
        prompts = np.zeros((len(MODALITIES) + 1, len(features)), dtype=np.int64)
        histogram = np.zeros((*shape, N_BINS), dtype=np.int64)
        for (feature, prompt_id), values in self._seen.items():
            labels, row = np.asarray(self._prompts[prompt_id]["modality"]), row_of[feature]
            for index, name in enumerate(MODALITIES):
                firing = values[(labels == _MODALITY_OF[name].value) & (values > 0)]
                active[index, row] += firing.size
                total[index, row] += firing.sum(dtype=np.float64)
                peak[index, row] = max(peak[index, row], firing.max(initial=0.0))
                prompts[index, row] += bool(firing.size)
                bins = histogram_bins(torch.from_numpy(firing)).numpy()
                histogram[index, row] += np.bincount(bins, minlength=N_BINS)
            prompts[-1, row] += bool((values > 0).any())
        n_tokens = np.array([self._n_tokens()[name] for name in MODALITIES])
        return statistics_table(np.array(features), n_tokens, active, total, peak, prompts, histogram)
