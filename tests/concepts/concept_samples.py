"""Planted dictionaries, and the word that the tests gather."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = "circle"
HOOK = "blocks.1.hook_resid_post"


def planted(
    seed: int, n: int = 400, d: int = 48, k: int = 8, *, active: float = 0.3, noise: float = 0.02
) -> tuple[Tensor, Tensor, Tensor]:
    """States that are sparse sums of directions with weights of at least 0: states, concepts, activations."""
    generator = torch.Generator().manual_seed(seed)
    concepts = torch.randn(k, d, generator=generator)
    concepts /= concepts.norm(dim=1, keepdim=True)
    fires = torch.rand(n, k, generator=generator) < active
    activations = 5 * torch.rand(n, k, generator=generator) * fires
    return activations @ concepts + noise * torch.randn(n, d, generator=generator), concepts, activations
