"""How far sums in another order may be off."""

from __future__ import annotations

import torch


def rounding(dtype: torch.dtype) -> float:
    """How far sums in another order may be off, as a share of the largest value."""
    return max(200 * torch.finfo(torch.float32).eps, 4 * torch.finfo(dtype).eps)
