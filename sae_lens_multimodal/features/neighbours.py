"""Features whose decoder directions point the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

if TYPE_CHECKING:
    from sae_lens import SAE

_BLOCK_ELEMENTS = 1 << 26
"""So many cosines exist at a time: 256 MiB in float32."""


class Neighbours(NamedTuple):
    """The nearest features of some, nearest first, on the CPU."""

    features: Int64[Tensor, "n count"]
    cosines: Float32[Tensor, "n count"]


@torch.no_grad()
def nearest_directions(sae: SAE[Any], features: Sequence[int], *, count: int) -> Neighbours:
    """Find for some features those whose decoder directions are nearest by cosine, themselves left out.

    One matrix product, a block of features at a time. Memory: the directions once more in float32, and 256 MiB.

    Args:
        sae: Any SAE-Lens SAE.
        features: Which.
        count: How many of each; at most the others there are.
    """
    directions = torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=1, eps=1e-12)
    chosen = torch.as_tensor(features, dtype=torch.int64, device=directions.device)
    count = min(count, len(directions) - 1)
    found: list[tuple[Tensor, Tensor]] = []
    for block in torch.split(chosen, max(1, _BLOCK_ELEMENTS // len(directions))):
        cosines = directions[block] @ directions.T
        cosines.scatter_(1, block[:, None], -2.0)
        top = cosines.topk(count, dim=1)
        found.append((top.indices.cpu(), top.values.cpu()))
    nothing = torch.zeros(0, count)
    indices = [nothing.long(), *(part for part, _ in found)]
    return Neighbours(torch.cat(indices), torch.cat([nothing, *(part for _, part in found)]))
