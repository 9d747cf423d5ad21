"""For every feature a short list of the best prompts by some weight, at most one for each picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

_ROWS_AT_ONCE = 1 << 16


@dataclass
class BestLists:
    """Row by row the prompts of largest weight, largest first; of prompts with the same key only the best.

    With the activation as weight this is a top list; with a random priority it is a uniform sample of the keys. Of
    equal weights the earlier prompt stays, so what a list holds does not depend on how the stream was cut up.

    Memory: `rows * length * (16 + bytes of a weight)` bytes.
    """

    weight: Shaped[Tensor, "rows length"]
    """0 where the list is not full."""
    prompt: Int64[Tensor, "rows length"]
    """Prompt ids; -1 where the list is not full."""
    key: Int64[Tensor, "rows length"]
    """Keys of the prompts' pictures; -1 where the list is not full."""

    @classmethod
    def empty(cls, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> Self:
        """Lists with nothing in them."""
        nothing = torch.full((rows, length), -1, dtype=torch.int64, device=device)
        return cls(torch.zeros(rows, length, dtype=dtype, device=device), nothing, nothing.clone())

    @property
    def length(self) -> int:
        """The most prompts that a list holds."""
        return self.weight.shape[1]

    def update(
        self, weight: Shaped[Tensor, "batch rows"], prompt: Int64[Tensor, "batch"], key: Int64[Tensor, "batch"]
    ) -> Bool[Tensor, "batch rows"]:
        """Offer a batch of prompts to every list.

        Args:
            weight: Of every prompt in every list; 0 or less does not qualify.
            prompt: Prompt ids, larger than all before.
            key: Keys of the prompts' pictures.

        Returns:
            Which prompts are now in which lists.
        """
        admitted = torch.zeros_like(weight, dtype=torch.bool)
        if not self.length:
            return admitted
        open_rows = (weight > self.weight[:, -1].clamp(min=0)).any(0).nonzero().squeeze(1)
        for rows in torch.split(open_rows, _ROWS_AT_ONCE):
            source = self._merge(rows, weight[:, rows].T, prompt, key)
            place, column = (source >= 0).nonzero(as_tuple=True)
            admitted[source[place, column], rows[place]] = True
        return admitted

    def _merge(
        self,
        rows: Int64[Tensor, "n"],
        weight: Shaped[Tensor, "n batch"],
        prompt: Int64[Tensor, "batch"],
        key: Int64[Tensor, "batch"],
    ) -> Int64[Tensor, "n length"]:
        """Merge candidates into some rows; returns which candidate now stands where, -1 for what stood before."""
        n, batch = weight.shape
        old = torch.full((n, self.length), -1, dtype=torch.int64, device=weight.device)
        weights = torch.cat([self.weight[rows], weight.clamp(min=0)], 1)
        keys = torch.cat([self.key[rows], key.expand(n, batch)], 1)
        prompts = torch.cat([self.prompt[rows], prompt.expand(n, batch)], 1)
        sources = torch.cat([old, torch.arange(batch, device=weight.device).expand(n, batch)], 1)
        order = _best_first(weights, keys)[:, : self.length]
        weights, keys, prompts, sources = (part.gather(1, order) for part in (weights, keys, prompts, sources))
        vacant = weights <= 0
        self.weight[rows] = weights
        self.key[rows] = keys.masked_fill(vacant, -1)
        self.prompt[rows] = prompts.masked_fill(vacant, -1)
        return sources.masked_fill(vacant, -1)


def _best_first(weights: Shaped[Tensor, "n m"], keys: Int64[Tensor, "n m"]) -> Int64[Tensor, "n m"]:
    """Order by falling weight, ties as they come; sets the weight of all but the best of each key to 0 (in place).

    >>> weights = torch.tensor([[5.0, 9.0, 7.0, 8.0]])
    >>> _best_first(weights, torch.tensor([[1, 2, 2, 3]])).tolist(), weights.tolist()
    ([[1, 3, 0, 2]], [[5.0, 9.0, 0.0, 8.0]])
    """
    order = weights.sort(dim=1, descending=True, stable=True).indices
    by_key = keys.gather(1, order).sort(dim=1, stable=True)
    repeated = by_key.values[:, 1:] == by_key.values[:, :-1]
    place = order.gather(1, by_key.indices[:, 1:])
    weights.scatter_(1, place, weights.gather(1, place).masked_fill(repeated, 0))
    return weights.sort(dim=1, descending=True, stable=True).indices
