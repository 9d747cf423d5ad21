"""The arguments of a block, cut to the last positions of a prompt."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_BY_POSITION = {"position_ids": -1, "cache_position": -1, "position_embeddings": -2}
"""Which dimension of an argument counts positions."""
_PLAIN = (bool, int, float, str, type(None))


def causal_mask(length: int, like: Tensor) -> Float[Tensor, "1 1 seq seq"]:
    """What is added to attention scores so that nobody sees what comes later."""
    mask = torch.full((length, length), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device)
    return mask.triu(1)[None, None]


def is_causal(mask: object, length: int, implementation: str) -> bool:
    """Whether a mask keeps every position from seeing those after it.

    Without a mask these implementations see to it themselves, where the attention module says so.
    """
    if mask is None:
        return implementation == "sdpa" or "flash" in implementation
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-2:] != (length, length):
        return False
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return not bool(seen.triu(1).any())


def sliced(kwargs: dict[str, Any], start: int, length: int) -> dict[str, Any] | None:
    """Cut a block's arguments to the positions from `start` on; None where one is of an unknown kind."""
    found: dict[str, Any] = {}
    for name, value in kwargs.items():
        if isinstance(value, _PLAIN):
            found[name] = value
        elif name == "attention_mask" and isinstance(value, Tensor) and value.dim() == 4:
            found[name] = value[..., start:, :]
        elif name in _BY_POSITION:
            found[name] = _cut(value, start, length, _BY_POSITION[name])
        elif name == "hidden_states":
            found[name] = value
        else:
            return None
    return found


def _cut(value: Any, start: int, length: int, dim: int) -> Any:  # noqa: ANN401 - tensors, alone or in a tuple
    if isinstance(value, tuple | list):
        return type(value)(_cut(one, start, length, dim) for one in value)
    return value.narrow(dim, start, length - start) if value.shape[dim] == length else value
