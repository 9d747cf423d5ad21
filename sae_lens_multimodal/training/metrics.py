"""How well an SAE reconstructs activations, for each modality apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from sae_lens_multimodal.types import Modality

MODALITIES: Mapping[str, Modality] = {"image": Modality.IMAGE, "text": Modality.TEXT}
"""The modalities that are reported, by the name they have in reports."""
DENSE_SHARE = 0.1
"""A feature is dense where it fires on more than this share of the tokens."""


def explained_variance(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> float | None:
    """Share of the variance that the reconstruction keeps: 1 - sum |x - x̂|² / sum |x - mean(x)|².

    None where there is no variance to explain: fewer than two rows, or equal rows.

    >>> import torch
    >>> explained_variance(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]]))
    0.5
    """
    x, x_hat = x.double(), x_hat.double()
    variance = (x - x.mean(0)).square().sum().item() if len(x) else 0.0
    if variance <= 0:
        return None
    return 1 - (x - x_hat).square().sum().item() / variance


def explained_variance_by_modality(
    x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"], modality: Int[Tensor, " n"]
) -> dict[str, float | None]:
    """`explained_variance` of the tokens of each modality.

    >>> import torch
    >>> x, x_hat = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([[0.0], [2.0], [9.0]])
    >>> explained_variance_by_modality(x, x_hat, torch.tensor([Modality.IMAGE, Modality.IMAGE, Modality.TEXT]))
    {'image': 1.0, 'text': None}
    """
    modality = modality.to(x.device)
    return {name: explained_variance(x[modality == code], x_hat[modality == code]) for name, code in MODALITIES.items()}


def modality_score(
    mean_image: Float[np.ndarray, "*shape"], mean_text: Float[np.ndarray, "*shape"]
) -> Float64[np.ndarray, "*shape"]:
    """How visual a feature is: E_img[z] / (E_img[z] + E_txt[z]) over per-token means; NaN where it never fires.

    1 fires on image tokens only, 0 on text tokens only. The measure is that of "Sparse Autoencoders Learn Monosemantic
    Features in Vision-Language Models" and others after it.

    >>> modality_score(np.array([3.0, 0.0, 0.0]), np.array([1.0, 2.0, 0.0])).tolist()
    [0.75, 0.0, nan]
    """
    image, text = np.asarray(mean_image, dtype=np.float64), np.asarray(mean_text, dtype=np.float64)
    total = image + text
    score: Float64[np.ndarray, "*shape"] = np.divide(image, total, out=np.full(total.shape, np.nan), where=total > 0)
    return score


@dataclass
class ModalityMetrics:
    """What is reported of one modality; None where there is nothing to measure."""

    n_tokens: int
    """Tokens that were measured."""
    explained_variance: float | None = None
    """See `explained_variance`; the mean is that of this modality."""
    normalised_mse: float | None = None
    """sum |x - x̂|² / sum |x|²: as `1 - explained_variance`, but about zero, so that the mean is part of the task."""
    cosine: float | None = None
    """Mean cosine of x and x̂."""
    l0: float | None = None
    """Mean number of features that fire on a token."""
    l1: float | None = None
    """Mean sum of the features' absolute activations on a token."""
    dead_share: float | None = None
    """Share of all features that fired on none of these tokens."""
    dense_share: float | None = None
    """Share of all features that fired on more than `DENSE_SHARE` of these tokens."""


@dataclass
class ReconstructionTotals:
    """Running sums over the tokens of one modality, from which its metrics follow."""

    n_tokens: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    """Of the activations less `shift`."""
    squared_size: float = 0.0
    """Of the activations themselves."""
    cosine: float = 0.0
    absolute: float = 0.0
    total: Float[Tensor, " d"] | None = None
    shift: Float[Tensor, " d"] | None = None
    fired: Int64[Tensor, " d_sae"] | None = None
    """On how many tokens each feature fired."""
    activation: Float64[Tensor, " d_sae"] | None = None
    """Sum of each feature's activations."""

    def add(self, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"], features: Float[Tensor, "n d_sae"]) -> None:
        """Count further tokens: activations, their reconstructions, and what their features are."""
        if not len(x):
            return
        x, x_hat = x.double(), x_hat.double()
        if self.shift is None:
            # Sums of squares lose digits far from zero, and residual streams lie far from zero.
            self.shift = x.mean(0)
        centred = x - self.shift
        fired = (features != 0).sum(0)
        activation = features.sum(0, dtype=torch.float64)
        self.n_tokens += len(x)
        self.squared_error += (x - x_hat).square().sum().item()
        self.squared_norm += centred.square().sum().item()
        self.squared_size += x.square().sum().item()
        self.cosine += torch.nn.functional.cosine_similarity(x, x_hat, dim=-1).sum().item()
        self.absolute += features.abs().sum(dtype=torch.float64).item()
        self.total = centred.sum(0) if self.total is None else self.total + centred.sum(0)
        self.fired = fired if self.fired is None else self.fired + fired
        self.activation = activation if self.activation is None else self.activation + activation

    @property
    def mean(self) -> Float[Tensor, " d"] | None:
        """The mean activation; None without tokens."""
        return None if self.total is None or self.shift is None else self.shift + self.total / self.n_tokens

    def metrics(self) -> ModalityMetrics:
        """The metrics of all tokens counted so far."""
        if self.total is None or self.fired is None:
            return ModalityMetrics(n_tokens=0)
        variance = self.squared_norm - self.total.square().sum().item() / self.n_tokens
        return ModalityMetrics(
            n_tokens=self.n_tokens,
            explained_variance=1 - self.squared_error / variance if self.n_tokens > 1 and variance > 0 else None,
            normalised_mse=self.squared_error / self.squared_size if self.squared_size > 0 else None,
            cosine=self.cosine / self.n_tokens,
            l0=int(self.fired.sum().item()) / self.n_tokens,
            l1=self.absolute / self.n_tokens,
            dead_share=(self.fired == 0).double().mean().item(),
            dense_share=(self.fired > DENSE_SHARE * self.n_tokens).double().mean().item(),
        )


@dataclass(frozen=True)
class FeatureUse:
    """How often and how strongly every feature fires, by modality."""

    density: Mapping[str, Float64[np.ndarray, " d_sae"]]
    """Share of the tokens of each modality on which it fires."""
    mean: Mapping[str, Float64[np.ndarray, " d_sae"]]
    """Mean activation over all tokens of each modality, zeros included."""

    @classmethod
    def of(cls, totals: Mapping[str, ReconstructionTotals], d_sae: int) -> FeatureUse:
        """Take it from running sums; a modality without tokens counts as one on which nothing fires."""
        density, mean = {}, {}
        for name, total in totals.items():
            seen = max(total.n_tokens, 1)
            zeros = np.zeros(d_sae)
            density[name] = zeros if total.fired is None else total.fired.double().cpu().numpy() / seen
            mean[name] = zeros if total.activation is None else total.activation.cpu().numpy() / seen
        return cls(density, mean)

    @property
    def modality_score(self) -> Float64[np.ndarray, " d_sae"]:
        """See `modality_score`."""
        return modality_score(self.mean["image"], self.mean["text"])

    def summary(self) -> dict[str, int]:
        """How many features fire on image tokens alone, on text tokens alone, on both, on none."""
        image, text = self.density["image"] > 0, self.density["text"] > 0
        return {
            "image_only": int((image & ~text).sum()),
            "text_only": int((text & ~image).sum()),
            "both": int((image & text).sum()),
            "neither": int((~image & ~text).sum()),
        }


def as_report(metrics: Mapping[str, ModalityMetrics]) -> dict[str, dict[str, Any]]:
    """The metrics as plain JSON values."""
    return {name: asdict(entry) for name, entry in metrics.items()}
