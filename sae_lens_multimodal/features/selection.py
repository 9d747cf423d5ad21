"""Choosing, at the end of a pass, the examples of every feature, and laying them out as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from sae_lens_multimodal.features.hashing import priorities
from sae_lens_multimodal.features.payload import Firings
from sae_lens_multimodal.features.schema import EXAMPLES, KINDS, MODALITIES, Kind
from sae_lens_multimodal.features.state import HarvestState

_FEATURES_AT_ONCE = 1024


@dataclass(frozen=True)
class _Chosen:
    """The examples of one kind and modality of some features, filled from the left."""

    prompt: Int64[Tensor, "n length"]
    """-1 where there are fewer."""
    key: Int64[Tensor, "n length"]
    firing: Int64[Tensor, "n length"]
    """Index into the firings; -1 where none were kept."""
    quantile: Float32[Tensor, "n length"]
    """NaN where it has none."""
    peak: Float32[Tensor, "n length 2"]
    mean: Float32[Tensor, "n length 2"]


class ExampleSelection:
    """Turns the lists and pools of a finished pass into examples; pure but for what it reads from the state."""

    def __init__(self, state: HarvestState) -> None:
        self._state = state
        self._firings = state.firings()
        self._start = self._firings.count.cumsum(0) - self._firings.count

    def tables(self) -> Iterator[pa.Table]:
        """The examples table, some features at a time, ordered by feature, kind, modality and rank."""
        for features in torch.split(torch.arange(len(self._state.features)), _FEATURES_AT_ONCE):
            blocks = {
                (kind, index): block
                for index in range(len(MODALITIES))
                for kind, block in zip(KINDS, self._of_modality(features, index), strict=True)
            }
            ordered = [(kind, index, blocks[kind, index]) for kind in KINDS for index in range(len(MODALITIES))]
            yield self._table(features, ordered)

    def _of_modality(self, features: Int64[Tensor, "n"], modality: int) -> tuple[_Chosen, _Chosen, _Chosen]:
        rows = (features + modality * len(self._state.features)).to(self._state.features.device)
        top, drawn = self._state.top, self._state.drawn
        top_prompt, top_key = top.prompt[rows].cpu(), top.key[rows].cpu()
        drawn_prompt, drawn_key = drawn.prompt[rows].cpu(), drawn.key[rows].cpu()
        taken = (drawn_key[:, :, None] == top_key[:, None, :]).any(2)
        return (
            self._fired(features, top_prompt, top_key),
            self._ordinary(features, modality, drawn_prompt, drawn_key, taken),
            self._silent(features, modality, torch.cat([top_key, drawn_key], 1)),
        )

    def _fired(
        self,
        features: Int64[Tensor, "n"],
        prompt: Int64[Tensor, "n length"],
        key: Int64[Tensor, "n length"],
        quantile: Float32[Tensor, "n length"] | None = None,
    ) -> _Chosen:
        """Look up what was kept of prompts in which the features fire."""
        firing, peak, mean = self._look_up(features, prompt)
        blank = torch.full(prompt.shape, float("nan")) if quantile is None else quantile
        return _Chosen(prompt, key, firing, blank, peak, mean)

    def _look_up(
        self, features: Int64[Tensor, "n"], prompt: Int64[Tensor, "n length"]
    ) -> tuple[Int64[Tensor, "n length"], Float32[Tensor, "n length 2"], Float32[Tensor, "n length 2"]]:
        pair = prompt * len(self._state.features) + features[:, None]
        firing = torch.searchsorted(self._firings.pair, pair).masked_fill(prompt < 0, -1)
        held = firing.clamp(min=0)
        if not len(self._firings.pair):
            blank = torch.zeros(*prompt.shape, 2)
            return firing, blank, blank
        return firing, self._firings.peak[held], self._firings.mean[held]

    def _ordinary(
        self,
        features: Int64[Tensor, "n"],
        modality: int,
        prompt: Int64[Tensor, "n drawn"],
        key: Int64[Tensor, "n drawn"],
        taken: Bool[Tensor, "n drawn"],
    ) -> _Chosen:
        """Of the drawn prompts that are in no top list, those evenly spaced by activation."""
        _, peak, mean = self._look_up(features, prompt)
        score = (peak if self._state.quotas.rank == "max" else mean)[:, :, modality].masked_fill(prompt < 0, -1)
        order = score.sort(dim=1, descending=True, stable=True).indices
        drawn = (prompt >= 0).sum(1, keepdim=True)
        place = order.argsort(dim=1).float()
        quantile = (drawn - place - 0.5) / drawn.clamp(min=1)
        free = ((prompt >= 0) & ~taken).gather(1, order)
        picked = evenly_spaced(free, self._state.quotas.n_ordinary)
        column = order.gather(1, picked.clamp(min=0))
        chosen = prompt.gather(1, column).masked_fill(picked < 0, -1)
        return self._fired(features, chosen, key.gather(1, column), quantile.gather(1, column))

    def _silent(self, features: Int64[Tensor, "n"], modality: int, firing_keys: Int64[Tensor, "n held"]) -> _Chosen:
        """Of the pool, prompts in which the features fire on no token of the modality; wholly silent ones first."""
        state = self._state
        pool, local = state.pools[modality], features.to(state.features.device)
        prompt, key = pool.prompt.cpu(), pool.key.cpu()
        peak, mean = (part[:, :, local].permute(2, 0, 1).cpu() for part in (pool.peak, pool.mean))
        known = (key[None, :, None] == firing_keys[:, None, :]).any(2)
        silent = (peak[:, :, modality] <= 0) & (prompt >= 0) & ~known
        weight = priorities(state.quotas.seed, key, state.features.cpu()[features]).T >> 1
        weight = weight + ((peak <= 0).all(2).long() << 62)
        order = weight.masked_fill(~silent, -1).sort(dim=1, descending=True, stable=True).indices
        order = order[:, : state.quotas.n_silent]
        absent = ~silent.gather(1, order)
        both = order[:, :, None].expand(*order.shape, 2)
        nothing = torch.full(order.shape, -1, dtype=torch.int64)
        return _Chosen(
            prompt[order].masked_fill(absent, -1),
            key[order],
            nothing,
            torch.full(order.shape, float("nan")),
            peak.gather(1, both),
            mean.gather(1, both),
        )

    def _table(self, features: Int64[Tensor, "n"], blocks: Sequence[tuple[Kind, int, _Chosen]]) -> pa.Table:
        shape = [block.prompt.shape[1] for _, _, block in blocks]
        whole = _Chosen(*(torch.cat([getattr(b, part.name) for _, _, b in blocks], 1) for part in fields(_Chosen)))
        there = whole.prompt >= 0
        kinds = np.repeat([kind for kind, _, _ in blocks], shape)
        modalities = np.repeat([MODALITIES[index] for _, index, _ in blocks], shape)
        ranks = np.concatenate([np.arange(length) for length in shape])
        column = there.nonzero(as_tuple=True)[1].numpy()
        positions, values = self._lists(whole.firing[there])
        quantile, peak, mean = (part[there].numpy() for part in (whole.quantile, whole.peak, whole.mean))
        columns = {
            "feature": self._state.features.cpu()[features].repeat_interleave(there.sum(1)).numpy(),
            "kind": kinds[column],
            "modality": modalities[column],
            "rank": ranks[column],
            "prompt_id": whole.prompt[there].numpy(),
            "picture_key": whole.key[there].numpy(),
            "quantile": pa.array(quantile, pa.float32(), mask=np.isnan(quantile)),
            "positions": positions,
            "values": values,
        }
        for index, name in enumerate(MODALITIES):
            columns[f"max_{name}"], columns[f"mean_{name}"] = peak[:, index], mean[:, index]
        return pa.table({field.name: pa.array(columns[field.name], field.type) for field in EXAMPLES}, schema=EXAMPLES)

    def _lists(self, firing: Int64[Tensor, "examples"]) -> tuple[pa.ListArray, pa.ListArray]:
        """Positions and values of some firings as list columns; an index of -1 is an empty list."""
        place, count = ragged_places(self._firings, self._start, firing)
        offsets = np.concatenate([[0], count.cumsum(0).numpy()]).astype(np.int32)
        position, value = self._firings.position[place].numpy(), self._firings.value[place].numpy()
        return pa.ListArray.from_arrays(offsets, position), pa.ListArray.from_arrays(offsets, value)


def ragged_places(
    firings: Firings, start: Int64[Tensor, "pairs"], chosen: Int64[Tensor, "examples"]
) -> tuple[Int64[Tensor, "entries"], Int64[Tensor, "examples"]]:
    """Where the entries of the chosen pairs lie, one pair after the other, and how many each has."""
    if not len(firings.pair):
        return torch.zeros(0, dtype=torch.int64), torch.zeros_like(chosen)
    held = chosen.clamp(min=0)
    count = firings.count[held].masked_fill(chosen < 0, 0)
    shift = start[held] - (count.cumsum(0) - count)
    return torch.arange(int(count.sum())) + shift.repeat_interleave(count), count


def evenly_spaced(free: Bool[Tensor, "n m"], wanted: int) -> Int64[Tensor, "n wanted"]:
    """Of the true columns of each row at most `wanted`, evenly spaced; -1 where there are fewer.

    >>> evenly_spaced(torch.tensor([[1, 1, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0]]).bool(), 3).tolist()
    [[1, 4, 6], [1, -1, -1]]
    """
    columns = free.int().sort(dim=1, descending=True, stable=True).indices
    count = free.sum(1, keepdim=True)
    taken = count.clamp(max=wanted)
    step = torch.arange(wanted).expand(len(free), wanted)
    index = ((2 * step + 1) * count) // (2 * taken.clamp(min=1))
    absent = step >= taken
    return columns.gather(1, index.clamp(max=max(free.shape[1] - 1, 0))).masked_fill(absent, -1)
