"""Where and how strongly features fire in the prompts that serve them as examples, and only in those."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Bool, Float32, Int32, Int64
from torch import Tensor

from sae_lens_multimodal.features.sparse import PromptMeasures, SparseActivations

_SLACK_ENTRIES = 1 << 20


@dataclass(frozen=True)
class Firings:
    """The firing tokens of some pairs of prompt and feature, ragged, in main memory.

    Memory: 8 bytes for each firing token and 32 for each pair.
    """

    pair: Int64[Tensor, "pairs"]
    """`prompt id * features + feature`, ascending."""
    peak: Float32[Tensor, "pairs 2"]
    """Largest activation on image and text tokens."""
    mean: Float32[Tensor, "pairs 2"]
    """Mean activation over image and text tokens."""
    count: Int64[Tensor, "pairs"]
    """Firing tokens."""
    position: Int32[Tensor, "entries"]
    value: Float32[Tensor, "entries"]

    @classmethod
    def empty(cls) -> Self:
        """Of no pair."""
        whole, ints = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
        return cls(whole, torch.zeros(0, 2), torch.zeros(0, 2), whole.clone(), ints, torch.zeros(0))

    @classmethod
    def of_batch(
        cls,
        batch: SparseActivations,
        measures: PromptMeasures,
        prompt: Int64[Tensor, "batch"],
        wanted: Bool[Tensor, "batch features"],
    ) -> Self:
        """Those of the wanted pairs of one batch, whose prompt ids ascend."""
        kept = wanted[batch.prompt, batch.feature].nonzero().squeeze(1)
        local = batch.prompt[kept] * batch.n_features + batch.feature[kept]
        order = local.sort(stable=True)
        pairs, count = torch.unique_consecutive(order.values, return_counts=True)
        kept = kept[order.indices]
        row, feature = pairs // batch.n_features, pairs % batch.n_features
        parts = (
            prompt[row] * batch.n_features + feature,
            measures.peak[row, :, feature],
            measures.mean_at(row, slice(None), feature),
            count,
            batch.position[kept],
            batch.value[kept],
        )
        return cls(*(part.cpu() for part in parts))

    def only(self, live: Int64[Tensor, "live"]) -> Self:
        """Those of the pairs that are also in `live` (ascending)."""
        place = torch.searchsorted(live, self.pair).clamp(max=max(len(live) - 1, 0))
        keep = live[place] == self.pair if len(live) else torch.zeros_like(self.pair, dtype=torch.bool)
        entries = keep.repeat_interleave(self.count)
        return type(self)(
            self.pair[keep],
            self.peak[keep],
            self.mean[keep],
            self.count[keep],
            self.position[entries],
            self.value[entries],
        )

    @classmethod
    def joined(cls, parts: list[Firings]) -> Self:
        """Several in one; the pairs of each come after those of the one before."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class Payload:
    """Firings that grow batch by batch and are swept of what no list refers to any more.

    Memory: at most twice that of the live firings, and a constant.
    """

    def __init__(self, firings: Firings | None = None) -> None:
        self._parts = [firings if firings is not None else Firings.empty()]
        self._entries = len(self._parts[0].position)
        self._limit = 2 * self._entries + _SLACK_ENTRIES

    @property
    def is_full(self) -> bool:
        """Whether it is time to sweep."""
        return self._entries > self._limit

    def add(self, firings: Firings) -> None:
        """Append those of a later batch."""
        self._parts.append(firings)
        self._entries += len(firings.position)

    def sweep(self, live: Int64[Tensor, "live"]) -> Firings:
        """Drop the pairs that are not in `live` (ascending), and give what is left, in order."""
        parts, self._parts = self._parts[::-1], []
        kept = Firings.joined([parts.pop().only(live) for _ in range(len(parts))])
        self._parts, self._entries = [kept], len(kept.position)
        self._limit = 2 * self._entries + _SLACK_ENTRIES
        return kept
