"""What is read of the examples of described features: sums of vectors, and counts of what fires together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from PIL import Image
from sae_lens import SAE
from safetensors.numpy import load_file, save_file
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.features.cofiring import PairCounts
from sae_lens_multimodal.features.embedding import Embed
from sae_lens_multimodal.features.sampled import SampledExample, SampledExamples, with_pictures
from sae_lens_multimodal.features.similarity import monosemanticity
from sae_lens_multimodal.features.sparse import above_zero
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.files import write_atomically
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.saes import encode_chunks, inference_sae
from sae_lens_multimodal.types import Modality

_CROPS_AT_ONCE = 64
_LEAST_PIXELS = 28
"""A crop is at least so wide and high, as far as the picture reaches."""
_ENCODED_ELEMENTS = 1 << 26


@dataclass
class Evidence:
    """Sums over the examples of every described feature."""

    hidden: Float32[np.ndarray, "features 2 d"]
    """Sums of the unit vectors of the strongest tokens of the top examples, by modality."""
    n_hidden: Int64[np.ndarray, "features 2"]
    n_tokens: Int64[np.ndarray, "features"]
    """Tokens that the pairs were counted on: the strongest of each top example, the middling of each ordinary one."""
    pairs: PairCounts
    crops: Float32[np.ndarray, "features d_embed"] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    """Sums of the crops' unit vectors, weighted by activation over the feature's largest."""
    weight: Float64[np.ndarray, "features 3"] = field(default_factory=lambda: np.zeros((0, 3)))
    """Sums of these weights and of their squares, and the number of crops."""
    all_crops: Float64[np.ndarray, "d_embed"] = field(default_factory=lambda: np.zeros(0))
    """Sum of all crops' unit vectors."""

    @classmethod
    def empty(cls, n_features: int, width: int, d_sae: int) -> Self:
        """Nothing read yet."""
        hidden = np.zeros((n_features, 2, width), dtype=np.float32)
        counts = np.zeros((n_features, 2), dtype=np.int64)
        return cls(
            hidden, counts, np.zeros(n_features, dtype=np.int64), PairCounts(d_sae), weight=np.zeros((n_features, 3))
        )

    def add_crops(self, rows: Int64[np.ndarray, "n"], weights: Float64[np.ndarray, "n"], vectors: np.ndarray) -> None:
        """Add crops of features, with activations from 0 to 1."""
        if not self.all_crops.size:
            self.crops = np.zeros((len(self.n_tokens), vectors.shape[1]), dtype=np.float32)
            self.all_crops = np.zeros(vectors.shape[1])
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        np.add.at(self.crops, rows, (weights[:, None] * unit).astype(np.float32))
        np.add.at(self.weight, rows, np.stack([weights, weights**2, np.ones(len(rows))], axis=1))
        self.all_crops += unit.sum(axis=0, dtype=np.float64)

    def random_crops(self) -> float | None:
        """Mean cosine of all pairs of crops, whatever feature they are of; None with fewer than two."""
        count = np.asarray(float(self.weight[:, 2].sum()))
        return float(monosemanticity(self.all_crops, count, count)) if count > 1 else None

    def save(self, file: Path, done: int) -> None:
        """Write a checkpoint of what was read of the first `done` prompts, in one step."""
        self.pairs.merge()
        names = ("hidden", "n_hidden", "n_tokens", "crops", "weight", "all_crops")
        arrays = {name: getattr(self, name) for name in names}
        arrays |= {"keys": self.pairs.keys, "counts": self.pairs.counts, "done": np.array([done])}
        write_atomically(file, lambda temporary: save_file(arrays, temporary))

    def load(self, file: Path) -> int:
        """Take over the last checkpoint; says how many prompts it is of."""
        if not file.is_file():
            return 0
        arrays = load_file(file)
        self.pairs.keys, self.pairs.counts = arrays.pop("keys"), arrays.pop("counts")
        done = int(arrays.pop("done")[0])
        for name, array in arrays.items():
            setattr(self, name, array)
        return done


class ExampleReader:
    """Runs the model over prompts that hold examples, and adds what it finds to the evidence."""

    def __init__(
        self,
        model: VisionLanguageModel,
        sae: SAE[Any],
        hook: str,
        store: FeatureStore,
        samples: SampledExamples,
        embed: Embed | None,
        evidence: Evidence,
    ) -> None:
        self.samples, self.evidence = samples, evidence
        self._model, self._sae, self._hook = model, inference_sae(sae), hook
        self._store, self._embed = store, embed
        self._largest = np.array([store.statistics_of(one)["max_image"] for one in samples.features])

    def read(self, start: int, size: int) -> None:
        """Read the examples of some prompts."""
        places = range(start, min(start + size, len(self.samples.prompt_ids)))
        prompts = [self._store.prompt(self.samples.prompt_ids[place]) for place in places]
        batch = self._model.encode([with_pictures(prompt) for prompt in prompts])
        values = read_activations(self._model, batch.to(self._model.device), self._hook)[self._hook].flatten(2)
        there = batch.layout.modality != Modality.PADDING.value
        offers: defaultdict[tuple[int, int], list[SampledExample]] = defaultdict(list)
        crops: list[tuple[SampledExample, Image.Image]] = []
        for index, (place, prompt) in enumerate(zip(places, prompts, strict=True)):
            columns = there[index].nonzero().squeeze(1).tolist()
            if len(columns) != len(prompt.tokens):
                raise StoreError(
                    f"prompt {prompt.prompt_id} has {len(columns)} tokens now and had {len(prompt.tokens)} when it was "
                    "harvested; give the model and processor of the harvest."
                )
            pictures = prompt.layout.image_index[0].numpy()
            for one in self.samples.of(place):
                offers[index, columns[one.sampled(prompt.modality)]].append(one)
                if self._embed is not None and one.modality == 0:
                    lit = one.region(prompt.modality, pictures)
                    picture = prompt.images[int(pictures[lit[0]])]
                    crops.append((one, prompt.layout.crop(picture, lit, min_size=_LEAST_PIXELS)))
        self._count(values, offers)
        self._compare(crops)

    def _count(self, values: Tensor, offers: dict[tuple[int, int], list[SampledExample]]) -> None:
        """Add the hidden states of the sampled tokens, and what fires on them."""
        tokens = torch.tensor(list(offers), dtype=torch.int64, device=values.device)
        chosen = values[tokens[:, 0], tokens[:, 1]]
        unit = torch.nn.functional.normalize(chosen.float(), dim=1).cpu().numpy()
        active = self._active(chosen)
        for place, examples in enumerate(offers.values()):
            for one in examples:
                self.evidence.n_tokens[one.row] += 1
                self.evidence.pairs.add(np.full(len(active[place]), one.row), active[place])
                if one.is_top:
                    self.evidence.hidden[one.row, one.modality] += unit[place]
                    self.evidence.n_hidden[one.row, one.modality] += 1

    def _active(self, tokens: Tensor) -> list[Int64[np.ndarray, "k"]]:
        """The features that fire on each token."""
        found: list[Int64[np.ndarray, "k"]] = []
        size = max(1, _ENCODED_ELEMENTS // int(self._sae.cfg.d_sae))
        for chunk, encoded in encode_chunks(self._sae, tokens, size, keep_sparse=True):
            token, feature, _ = above_zero(encoded, None)
            count = torch.bincount(token, minlength=chunk.stop - chunk.start)
            found += [part.cpu().numpy() for part in torch.split(feature, count.tolist())]
        return found

    def _compare(self, crops: Sequence[tuple[SampledExample, Image.Image]]) -> None:
        for start in range(0, len(crops), _CROPS_AT_ONCE):
            part = crops[start : start + _CROPS_AT_ONCE]
            assert self._embed is not None
            vectors = self._embed([picture for _, picture in part])
            rows = np.array([one.row for one, _ in part])
            # The smallest activation is 0: a feature is silent somewhere.
            weights = np.array([one.max_image for one, _ in part]) / self._largest[rows]
            self.evidence.add_crops(rows, weights, np.asarray(vectors, dtype=np.float64))
