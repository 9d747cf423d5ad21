"""Histograms of activations over fixed logarithmic bins, and what can be read off them."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from sae_lens_multimodal.training.metrics import modality_score as modality_score

LOWEST_EXPONENT: Final = -12
HIGHEST_EXPONENT: Final = 12
BINS_PER_OCTAVE: Final = 2
N_BINS: Final = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * BINS_PER_OCTAVE


def histogram_edges() -> Float64[np.ndarray, "bins+1"]:
    """Edges of the bins: powers of the square root of 2 from 2**-12 to 2**12."""
    return np.exp2(np.linspace(LOWEST_EXPONENT, HIGHEST_EXPONENT, N_BINS + 1))


def histogram_bins(values: Float[Tensor, "n"]) -> Int64[Tensor, "n"]:
    """Bin of every positive value; what lies outside falls into the first or last bin.

    >>> histogram_bins(torch.tensor([0.0001, 1.0, 1.4, 1.5, 1e9])).tolist()
    [0, 24, 24, 25, 47]
    """
    inner = torch.as_tensor(histogram_edges()[1:-1], dtype=torch.float32, device=values.device)
    return torch.bucketize(values.float(), inner, right=True)


def quantile_of_histogram(
    counts: Int[np.ndarray, "bins"], edges: Float64[np.ndarray, "bins+1"], quantile: float
) -> float:
    """Value below which `quantile` of the counted lie, evenly spread (in the logarithm) within each bin; 0 if none.

    >>> counts = np.zeros(N_BINS, dtype=np.int64)
    >>> counts[24] = 10                                      # the bin from 1 to 1.414
    >>> quantile_of_histogram(counts, histogram_edges(), 1.0) == 2**0.5
    True
    """
    total = int(counts.sum())
    if total == 0:
        return 0.0
    wanted = quantile * total
    cumulated = np.concatenate([[0], np.cumsum(counts)])
    index = min(int(np.searchsorted(cumulated[1:], wanted, side="left")), len(counts) - 1)
    share = (wanted - cumulated[index]) / max(int(counts[index]), 1)
    low, high = np.log2(edges[index]), np.log2(edges[index + 1])
    return float(np.exp2(low + share * (high - low)))
