"""How well an SAE reconstructs activations, for each modality apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multimodal.types import Modality

MODALITIES: Mapping[str, Modality] = {"image": Modality.IMAGE, "text": Modality.TEXT}
"""The modalities that are reported, by the name they have in reports."""


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


@dataclass
class ModalityMetrics:
    """What is reported of one modality."""

    n_tokens: int
    """Tokens that were measured."""
    explained_variance: float | None
    """See `explained_variance`; the mean is that of this modality."""
    l0: float | None
    """Mean number of features that fire on a token."""
    dead_share: float | None
    """Share of all features that fired on none of these tokens."""


@dataclass
class ReconstructionTotals:
    """Running sums over the tokens of one modality, from which its metrics follow."""

    n_tokens: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    active: int = 0
    total: Float[Tensor, " d"] | None = None
    shift: Float[Tensor, " d"] | None = None
    fired: Bool[Tensor, " d_sae"] | None = field(default=None)

    def add(self, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"], features: Float[Tensor, "n d_sae"]) -> None:
        """Count further tokens: activations, their reconstructions, and what their features are."""
        if not len(x):
            return
        x, x_hat = x.double(), x_hat.double()
        if self.shift is None:
            # Sums of squares lose digits far from zero, and residual streams lie far from zero.
            self.shift = x.mean(0)
        centred = x - self.shift
        firing = features != 0
        fired = firing.any(0)
        self.n_tokens += len(x)
        self.squared_error += (x - x_hat).square().sum().item()
        self.squared_norm += centred.square().sum().item()
        self.active += int(firing.sum().item())
        self.total = centred.sum(0) if self.total is None else self.total + centred.sum(0)
        self.fired = fired if self.fired is None else self.fired | fired

    def metrics(self) -> ModalityMetrics:
        """The metrics of all tokens counted so far."""
        if self.total is None or self.fired is None:
            return ModalityMetrics(n_tokens=0, explained_variance=None, l0=None, dead_share=None)
        variance = self.squared_norm - self.total.square().sum().item() / self.n_tokens
        explained = 1 - self.squared_error / variance if self.n_tokens > 1 and variance > 0 else None
        return ModalityMetrics(
            n_tokens=self.n_tokens,
            explained_variance=explained,
            l0=self.active / self.n_tokens,
            dead_share=1 - self.fired.double().mean().item(),
        )


def as_report(metrics: Mapping[str, ModalityMetrics]) -> dict[str, dict[str, Any]]:
    """The metrics as plain JSON values."""
    return {name: asdict(entry) for name, entry in metrics.items()}
