"""All that a pass over a dataset remembers about features; its size depends on their number, not on the dataset's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final, Literal, Self, TypeAlias

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from sae_lens_multimodal.features.hashing import priorities, priorities_of
from sae_lens_multimodal.features.lists import BestLists
from sae_lens_multimodal.features.payload import Firings, Payload
from sae_lens_multimodal.features.pool import PromptPool
from sae_lens_multimodal.features.schema import MODALITIES
from sae_lens_multimodal.features.sparse import PromptMeasures, SparseActivations
from sae_lens_multimodal.features.statistics import RunningStatistics

Rank: TypeAlias = Literal["max", "mean"]

POOL_PER_SILENT: Final = 4
SMALLEST_POOL: Final = 32
_POOL_STREAM: Final = -1


@dataclass(frozen=True)
class Quotas:
    """How many examples of each kind a feature keeps, per modality, and how they are chosen."""

    n_top: int
    n_ordinary: int
    n_silent: int
    rank: Rank
    seed: int

    @property
    def n_drawn(self) -> int:
        """Prompts drawn for the ordinary ones: as many as surely leave enough once those of the top list are out."""
        return self.n_ordinary + self.n_top if self.n_ordinary else 0

    @property
    def n_pool(self) -> int:
        """Prompts in the pool of silent ones."""
        return max(SMALLEST_POOL, POOL_PER_SILENT * self.n_silent) if self.n_silent else 0


def state_bytes(
    n_features: int, quotas: Quotas, *, firings_a_pair: float, batch_prompts: int = 0, batch_entries: int = 0
) -> int:
    """The most bytes that a pass holds for its features, once every list is full.

    With F features, T top, O ordinary and P pool places, n tokens firing in a mean example, and a batch of B prompts
    with E activations above zero (K for each of its tokens, with a top-k SAE):

        lists, pools, statistics:  F * (2 * (44 * T + 24 * O) + 32 * P + 832)
        firings:                   2 * F * (2 * T + O) * (32 + 8 * n), three times over while they are swept
        batch:                     2 * F * B * 14 + 120 * E

    The first and the last are on the SAE's device, the second in main memory.

    Args:
        n_features: Features that are followed.
        quotas: How many examples each keeps.
        firings_a_pair: Tokens on which a feature fires in an example, on the average.
        batch_prompts: Prompts of a batch.
        batch_entries: Activations above zero in a batch.

    Example:
        >>> quotas = Quotas(n_top=16, n_ordinary=16, n_silent=8, rank="max", seed=0)
        >>> round(state_bytes(131072, quotas, firings_a_pair=0) / 2**30, 2)  # lists alone, and empty examples
        1.62
    """
    top, drawn, pool = quotas.n_top, quotas.n_drawn, quotas.n_pool
    fixed = n_features * (2 * (20 * top + 24 * drawn) + 32 * pool + 832)
    pairs = 2 * n_features * (top + drawn) * (32 + 8 * firings_a_pair)
    return int(fixed + 3 * pairs + 28 * n_features * batch_prompts + 120 * batch_entries)


class HarvestState:
    """Statistics, lists, pools and firings of all features.

    Row `m * features + f` of the lists is feature `f` by modality `m` (0 image, 1 text).

    Memory by the number of features and of examples only, whatever the dataset's length: see `state_bytes`. At
    131072 features and the default quotas, lists, pools and statistics take 0.5 GiB on the SAE's device; the firings of
    the examples, once every list is full, some 2.3 GiB in main memory.
    """

    def __init__(self, quotas: Quotas, features: Int64[Tensor, "features"], d_sae: int) -> None:
        n, device = len(features), features.device
        self.quotas = quotas
        self.features = features
        self.statistics = RunningStatistics.empty(n, device)
        self.top = BestLists.empty(2 * n, quotas.n_top, torch.float32, device)
        self.drawn = BestLists.empty(2 * n, quotas.n_drawn, torch.int64, device)
        self.pools = [PromptPool.empty(quotas.n_pool, n, device) for _ in MODALITIES]
        self.payload = Payload()
        self._streams = torch.cat([features, features + d_sae])

    def update(
        self,
        batch: SparseActivations,
        measures: PromptMeasures,
        prompt: Int64[Tensor, "batch"],
        key: Int64[Tensor, "batch"],
    ) -> Bool[Tensor, "batch"]:
        """Take in one batch.

        Args:
            batch: Its activations.
            measures: What they come to per prompt.
            prompt: Prompt ids, ascending, larger than all before.
            key: Keys of the prompts' pictures.

        Returns:
            Which prompts now serve as an example of something.
        """
        self.statistics.update(batch, measures)
        fires = measures.fires
        place, modality, feature = fires
        row = modality * len(self.features) + feature
        ranked = measures.peak[fires] if self.quotas.rank == "max" else measures.mean_at(*fires)
        admitted = self.top.offer(place, row, ranked, prompt, key)
        if self.drawn.length:
            drawn = priorities_of(self.quotas.seed, key[place], self._streams[row])
            admitted |= self.drawn.offer(place, row, drawn, prompt, key)
        wanted = torch.zeros(len(prompt), len(self.features), dtype=torch.bool, device=prompt.device)
        wanted[place[admitted], feature[admitted]] = True
        self.payload.add(Firings.of_batch(batch, measures, prompt, wanted))
        if self.payload.is_full:
            self.payload.sweep(self._live_pairs())
        return wanted.any(1) | self._update_pools(measures, prompt, key)

    def _update_pools(
        self, measures: PromptMeasures, prompt: Int64[Tensor, "batch"], key: Int64[Tensor, "batch"]
    ) -> Bool[Tensor, "batch"]:
        stream = torch.tensor([_POOL_STREAM], device=key.device)
        weight = priorities(self.quotas.seed, key, stream).squeeze(1)
        admitted = torch.zeros_like(weight, dtype=torch.bool)
        for index, pool in enumerate(self.pools):
            admitted |= pool.update(weight * (measures.n_tokens[:, index] > 0), prompt, key, measures)
        return admitted

    def _live_pairs(self) -> Int64[Tensor, "pairs"]:
        """Pairs of prompt and feature that some list holds, ascending."""
        n = len(self.features)
        rows = torch.arange(2 * n, device=self.features.device)[:, None] % n
        pairs = [(lists.prompt * n + rows)[lists.prompt >= 0] for lists in (self.top, self.drawn)]
        return _distinct(torch.cat(pairs))

    def live_prompts(self) -> Int64[Tensor, "prompts"]:
        """Prompts that some list or pool holds, ascending."""
        held = (self.top.prompt, self.drawn.prompt, *(pool.prompt for pool in self.pools))
        prompts = _distinct(torch.cat([part.flatten() for part in held]))
        return prompts[prompts >= 0]

    def firings(self) -> Firings:
        """The firings of all pairs that some list holds, swept."""
        return self.payload.sweep(self._live_pairs())

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors on the CPU, for a checkpoint."""
        parts = {**self._fixed_parts(), "firings": self.firings()}
        named = {f"{name}.{field}": value for name, part in parts.items() for field, value in _fields(part)}
        return {name: value.detach().cpu().contiguous() for name, value in named.items()}

    def restore(self, tensors: dict[str, Tensor]) -> Self:
        """Take over what `tensors` gave for the same quotas and features."""
        firings = Firings(**{field.name: tensors[f"firings.{field.name}"] for field in fields(Firings)})
        self.payload = Payload(firings)
        for name, part in self._fixed_parts().items():
            for field, value in _fields(part):
                value.copy_(tensors[f"{name}.{field}"])
        return self

    def _fixed_parts(self) -> dict[str, object]:
        """What keeps its size from beginning to end."""
        pools = {f"pool_{name}": pool for name, pool in zip(MODALITIES, self.pools, strict=True)}
        return {"statistics": self.statistics, "top": self.top, "drawn": self.drawn, **pools}


def _distinct(numbers: Int64[Tensor, "n"]) -> Int64[Tensor, "m"]:
    """Each number once, ascending, on the CPU."""
    distinct: Tensor = torch.unique(numbers)
    return distinct.cpu()


def _fields(part: object) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in vars(part).items() if isinstance(value, Tensor)]
