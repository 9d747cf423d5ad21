"""Buffers of activations, one for each modality, that hand out batches with exact shares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor


def share_counts(shares: Mapping[str, float], batch_tokens: int) -> dict[str, int]:
    """How many tokens of each modality a batch holds: the shares rounded so that they add up to the batch.

    >>> share_counts({"image": 0.5, "text": 0.5}, 7)
    {'image': 4, 'text': 3}
    >>> share_counts({"image": 1.0, "text": 0.0}, 4)
    {'image': 4}
    """
    exact = {name: share * batch_tokens for name, share in shares.items() if share > 0}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: batch_tokens - sum(counts.values())]:
        counts[name] += 1
    return counts


class Pool:
    """A bounded buffer of activations that are handed out in random order.

    What arrives while it is full is subsampled: of all tokens since the last `begin_refill`, and of those that waited
    then, every one has the same chance to stay. With `keep_surplus` what finds no room waits for the next refill
    instead; that is for who stops reading as soon as the pool is full.
    """

    def __init__(
        self, capacity: int, generator: torch.Generator, device: torch.device, *, keep_surplus: bool = False
    ) -> None:
        """Make an empty pool.

        Args:
            capacity: how many tokens it holds.
            generator: a generator on the CPU, from which all its choices come.
            device: where its activations lie.
            keep_surplus: whether tokens that find no room are kept for the next refill.
        """
        self.capacity = capacity
        self.dropped = 0
        """Tokens that found no room, since the beginning."""
        self._generator = generator
        self._device = device
        self._rows: Tensor | None = None
        self._labels = torch.zeros(capacity, dtype=torch.int8)
        self._keys = torch.full((capacity,), -1.0)
        self._order: Tensor | None = None
        self._keep_surplus = keep_surplus
        self._surplus: list[tuple[Tensor, Tensor]] = []

    @property
    def count(self) -> int:
        """How many tokens wait."""
        return int((self._keys >= 0).sum())

    @property
    def is_full(self) -> bool:
        """Whether there is no room."""
        return self.count == self.capacity

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that what is handed out later depends on: the tokens that wait, their places and their order."""
        slots = (self._keys >= 0).nonzero().squeeze(1)
        state = {"slots": slots, "keys": self._keys[slots], "labels": self._labels[slots]}
        if self._rows is not None:
            state["rows"] = self._rows[slots.to(self._device)]
        if self._order is not None:
            state["order"] = self._order
        if self._surplus:
            state["surplus"] = torch.cat([rows for rows, _ in self._surplus])
            state["surplus_labels"] = torch.cat([labels for _, labels in self._surplus])
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Be as the pool was at `snapshot`.

        Raises:
            IndexError: that pool was larger.
        """
        slots = state["slots"]
        if len(slots) and int(slots.max()) >= self.capacity:
            raise IndexError(f"The saved pool holds place {int(slots.max())}; this one has {self.capacity} places.")
        self._keys.fill_(-1.0)
        self._keys[slots] = state["keys"]
        self._labels[slots] = state["labels"]
        self._order = state.get("order")
        self._surplus = []
        if "surplus" in state:
            self._surplus = [(state["surplus"].to(self._device), state["surplus_labels"])]
        if "rows" in state:
            rows = state["rows"]
            self._rows = torch.empty(self.capacity, rows.shape[1], dtype=rows.dtype, device=self._device)
            self._rows[slots.to(self._device)] = rows.to(self._device)

    def begin_refill(self) -> None:
        """Give tokens that still wait the same chance to stay as those to come."""
        waiting = self._keys >= 0
        self._keys[waiting] = torch.rand(int(waiting.sum()), generator=self._generator)
        self._order = None
        surplus, self._surplus = self._surplus, []
        for rows, labels in surplus:
            self.add(rows, labels)

    def add(self, rows: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> None:
        """Take in further tokens; where there are too many, a random choice stays."""
        if self._keep_surplus:
            rows, labels = self._set_surplus_aside(rows, labels)
        if not len(rows):
            return
        if self._rows is None:
            self._rows = torch.empty(self.capacity, rows.shape[1], dtype=rows.dtype, device=self._device)
        new_keys = torch.rand(len(rows), generator=self._generator)
        kept_slots, kept_new = self._choose(new_keys)
        stays = torch.zeros(self.capacity, dtype=torch.bool)
        stays[kept_slots] = True
        self.dropped += self.count + len(rows) - len(kept_slots) - len(kept_new)
        target = (~stays).nonzero().squeeze(1)
        self._keys[target] = -1.0
        target = target[: len(kept_new)]
        self._keys[target] = new_keys[kept_new]
        self._labels[target] = labels.cpu()[kept_new].to(torch.int8)
        self._rows[target.to(self._device)] = rows[kept_new.to(rows.device)].to(self._device)

    def drop_surplus(self) -> None:
        """Keep no more tokens for the next refill, for who reads on when the pool is full."""
        self._keep_surplus = False

    def _set_surplus_aside(self, rows: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """A random choice of the tokens that there is room for; the others wait."""
        room = self.capacity - self.count
        if len(rows) <= room:
            return rows, labels
        order = torch.randperm(len(rows), generator=self._generator)
        now, later = order[:room], order[room:]
        self._surplus.append((rows[later.to(rows.device)].to(self._device), labels.cpu()[later].to(torch.int8)))
        return rows[now.to(rows.device)], labels.cpu()[now]

    def _choose(self, new_keys: Float[Tensor, " n"]) -> tuple[Int[Tensor, " kept"], Int[Tensor, " added"]]:
        """Which slots stay and which of the new tokens come in: those with the largest keys."""
        slots = (self._keys >= 0).nonzero().squeeze(1)
        excess = len(slots) + len(new_keys) - self.capacity
        if excess <= 0:
            return slots, torch.arange(len(new_keys))
        kept = torch.cat([self._keys[slots], new_keys]).topk(self.capacity, sorted=False).indices
        kept = kept.sort().values
        return slots[kept[kept < len(slots)]], kept[kept >= len(slots)] - len(slots)

    def take(self, count: int) -> tuple[Float[Tensor, "count d"], Int[Tensor, " count"]]:
        """Hand out that many random tokens and their labels; they leave the pool.

        Raises:
            IndexError: fewer wait.
        """
        if self._rows is None or self.count < count:
            raise IndexError(f"The pool holds {self.count} tokens; {count} were asked for.")
        if self._order is None:
            slots = (self._keys >= 0).nonzero().squeeze(1)
            self._order = slots[torch.randperm(len(slots), generator=self._generator)]
        chosen, self._order = self._order[:count], self._order[count:]
        self._keys[chosen] = -1.0
        return self._rows[chosen.to(self._device)], self._labels[chosen]
