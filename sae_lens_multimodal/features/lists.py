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
        """Offer a batch of prompts to every list; `offer` is for when few prompts qualify for a list.

        Args:
            weight: Of every prompt in every list; 0 or less does not qualify.
            prompt: Prompt ids, larger than all before.
            key: Keys of the prompts' pictures.

        Returns:
            Which prompts are now in which lists.
        """
        admitted = torch.zeros_like(weight, dtype=torch.bool)
        place, row = (weight > 0).nonzero(as_tuple=True)
        admitted[place, row] = self.offer(place, row, weight[place, row], prompt, key)
        return admitted

    def offer(
        self,
        place: Int64[Tensor, "offers"],
        row: Int64[Tensor, "offers"],
        weight: Shaped[Tensor, "offers"],
        prompt: Int64[Tensor, "batch"],
        key: Int64[Tensor, "batch"],
    ) -> Bool[Tensor, "offers"]:
        """Offer prompts of a batch to some lists.

        The cost is that of the offers that are good enough, not of the lists: each prompt is put at its place in the
        rows it is offered to, one prompt after the other.

        Args:
            place: Which prompt of the batch is offered, ascending.
            row: To which list; a prompt to each at most once.
            weight: With which weight, above 0.
            prompt: Prompt ids of the batch, larger than all before.
            key: Keys of their pictures.

        Returns:
            Which offers are now in their lists.
        """
        admitted = torch.zeros_like(place, dtype=torch.bool)
        if not self.length or not len(place):
            return admitted
        start = 0
        for index, count in enumerate(torch.bincount(place, minlength=len(prompt)).tolist()):
            mine = torch.arange(start, start + count, device=place.device)
            start += count
            for part in torch.split(mine, _ROWS_AT_ONCE):
                good = part[weight[part] > self.weight[row[part], -1]]
                admitted[good[self._insert(row[good], weight[good], prompt[index], key[index])]] = True
        # A later prompt of the batch may have pushed an earlier one out.
        there = admitted.nonzero().squeeze(1)
        admitted[there] = (self.prompt[row[there]] == prompt[place[there], None]).any(1)
        return admitted

    def _insert(
        self, rows: Int64[Tensor, "n"], weight: Shaped[Tensor, "n"], prompt: Int64[Tensor, ""], key: Int64[Tensor, ""]
    ) -> Bool[Tensor, "n"]:
        """Put one prompt into rows where it beats the last place; says where its picture was not there as strongly."""
        weights, keys, prompts = self.weight[rows], self.key[rows], self.prompt[rows]
        column = torch.arange(self.length, device=rows.device)
        at = (weights >= weight[:, None]).sum(1, keepdim=True)
        moves, better = column > at, torch.ones_like(rows, dtype=torch.bool)
        same = keys == key
        if bool(same.any()):
            # What drops out is the weaker prompt of the same picture rather than the last.
            out = torch.where(same, column, self.length - 1).amin(1, keepdim=True)
            moves, better = moves & (column <= out), (at <= out).squeeze(1)
        source, new = column - moves.long(), (column == at) & better[:, None]
        for held, values, offered in (
            (self.weight, weights, weight[:, None]),
            (self.key, keys, key),
            (self.prompt, prompts, prompt),
        ):
            held[rows] = torch.where(new, offered, values.gather(1, source))
        return better
