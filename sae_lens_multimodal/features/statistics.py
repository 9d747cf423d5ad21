"""Running statistics of every feature by modality, and the table they end as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float32, Float64, Int, Int64
from torch import Tensor

from sae_lens_multimodal.features.histogram import N_BINS, histogram_bins, modality_score
from sae_lens_multimodal.features.schema import MODALITIES, STATISTICS
from sae_lens_multimodal.features.sparse import PromptMeasures, SparseActivations


@dataclass
class RunningStatistics:
    """Sums over all tokens seen so far; the modality axis is ordered as `MODALITIES`.

    Memory: about `features * (2 * bins * 8 + 64)` bytes.
    """

    n_tokens: Int64[Tensor, "2"]
    active: Int64[Tensor, "2 features"]
    total: Float64[Tensor, "2 features"]
    peak: Float32[Tensor, "2 features"]
    prompts: Int64[Tensor, "3 features"]
    """Prompts in which a feature fires: on image tokens, on text tokens, on any."""
    histogram: Int64[Tensor, "2 features bins"]

    @classmethod
    def empty(cls, n_features: int, device: torch.device) -> Self:
        """Nothing seen yet."""
        n = len(MODALITIES)
        return cls(
            n_tokens=torch.zeros(n, dtype=torch.int64, device=device),
            active=torch.zeros(n, n_features, dtype=torch.int64, device=device),
            total=torch.zeros(n, n_features, dtype=torch.float64, device=device),
            peak=torch.zeros(n, n_features, dtype=torch.float32, device=device),
            prompts=torch.zeros(n + 1, n_features, dtype=torch.int64, device=device),
            histogram=torch.zeros(n, n_features, N_BINS, dtype=torch.int64, device=device),
        )

    def update(self, batch: SparseActivations, measures: PromptMeasures) -> None:
        """Count one batch of prompts."""
        n_features = self.active.shape[1]
        self.n_tokens += measures.n_tokens.sum(0)
        place = batch.modality * n_features + batch.feature
        ones = torch.ones_like(place)
        self.active.view(-1).index_add_(0, place, ones)
        self.histogram.view(-1).index_add_(0, place * N_BINS + histogram_bins(batch.value), ones)
        self.total.view(-1).index_add_(0, place, batch.value.double())
        self.peak.view(-1).scatter_reduce_(0, place, batch.value, reduce="amax")
        prompt, modality, feature = measures.fires
        first = (modality == 0) | (measures.peak[prompt, 0, feature] <= 0)
        fired = torch.cat([modality * n_features + feature, 2 * n_features + feature[first]])
        self.prompts.view(-1).index_add_(0, fired, torch.ones_like(fired))

    def table(self, features: Int64[np.ndarray, "features"]) -> pa.Table:
        """The statistics table, one row for every feature."""
        parts = (self.n_tokens, self.active, self.total, self.peak, self.prompts, self.histogram)
        return statistics_table(features, *(part.cpu().numpy() for part in parts))


def statistics_table(
    features: Int[np.ndarray, "features"],
    n_tokens: Int[np.ndarray, "2"],
    active: Int[np.ndarray, "2 features"],
    total: Float[np.ndarray, "2 features"],
    peak: Float[np.ndarray, "2 features"],
    prompts: Int[np.ndarray, "3 features"],
    histogram: Int[np.ndarray, "2 features bins"],
) -> pa.Table:
    """Turn counts and sums into the statistics table.

    Args:
        features: Indices in the sparse autoencoder.
        n_tokens: Tokens seen of each modality.
        active: Tokens of each modality on which the feature fires.
        total: Sums of activation.
        peak: Largest activation.
        prompts: Prompts in which the feature fires on image tokens, on text tokens, on any.
        histogram: Firing tokens by activation.
    """
    seen = np.maximum(n_tokens, 1)[:, None]
    density, mean = active / seen, total / seen
    mean_active = total / np.maximum(active, 1)
    score = modality_score(mean[0], mean[1])
    columns = {
        "feature": features,
        "density": active.sum(0) / max(int(n_tokens.sum()), 1),
        "max_activation": peak.max(0),
        "modality_score": pa.array(score, mask=np.isnan(score)),
        "n_prompts": prompts[2],
        "histogram": _lists(histogram.sum(0)),
    }
    for index, name in enumerate(MODALITIES):
        columns[f"density_{name}"] = density[index]
        columns[f"mean_{name}"] = mean[index]
        columns[f"mean_active_{name}"] = mean_active[index]
        columns[f"max_{name}"] = peak[index]
        columns[f"n_active_{name}"] = active[index]
        columns[f"n_prompts_{name}"] = prompts[index]
        columns[f"histogram_{name}"] = _lists(histogram[index])
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in STATISTICS}, schema=STATISTICS)


def _lists(counts: Int64[np.ndarray, "features bins"]) -> pa.ListArray:
    """Rows of a matrix as a list column."""
    offsets = np.arange(counts.shape[0] + 1, dtype=np.int32) * counts.shape[1]
    return pa.ListArray.from_arrays(offsets, counts.reshape(-1))
