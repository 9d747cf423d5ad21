"""A fixed sample of prompts, with what every feature does in each: where silent examples come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from sae_lens_multimodal.features.sparse import PromptMeasures


@dataclass
class PromptPool:
    """A seeded uniform sample of pictures (or texts, where a prompt has none), the first prompt of each.

    One pool serves all features: each takes its silent examples from those of the pool in which it does not fire.

    Memory: `pool * features * 16` bytes.
    """

    weight: Int64[Tensor, "pool"]
    """Random priority of the key; the largest are kept. 0 where the pool is not full."""
    prompt: Int64[Tensor, "pool"]
    key: Int64[Tensor, "pool"]
    peak: Float32[Tensor, "pool 2 features"]
    """Largest activation by modality."""
    mean: Float32[Tensor, "pool 2 features"]
    """Mean activation by modality."""

    @classmethod
    def empty(cls, size: int, n_features: int, device: torch.device) -> Self:
        """A pool with nothing in it."""
        nothing = torch.full((size,), -1, dtype=torch.int64, device=device)
        blank = torch.zeros(size, 2, n_features, dtype=torch.float32, device=device)
        return cls(torch.zeros(size, dtype=torch.int64, device=device), nothing, nothing.clone(), blank, blank.clone())

    def update(
        self,
        weight: Int64[Tensor, "batch"],
        prompt: Int64[Tensor, "batch"],
        key: Int64[Tensor, "batch"],
        measures: PromptMeasures,
    ) -> Bool[Tensor, "batch"]:
        """Offer a batch of prompts; those of weight 0 do not qualify. Returns which are now in the pool."""
        slots: dict[int, int] = {}
        for index, (value, name) in enumerate(zip(weight.tolist(), key.tolist(), strict=True)):
            if not len(self.weight) or bool((self.key == name).any()):
                continue
            slot = int(self.weight.argmin())
            if value <= int(self.weight[slot]):
                continue
            self.weight[slot], self.prompt[slot], self.key[slot] = value, prompt[index], name
            slots[slot] = index
        admitted = torch.zeros_like(weight, dtype=torch.bool)
        for slot, index in slots.items():
            self.peak[slot], self.mean[slot] = measures.peak[index], measures.mean_at(index)
            admitted[index] = True
        return admitted
