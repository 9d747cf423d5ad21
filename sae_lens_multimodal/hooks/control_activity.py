"""How active every feature is at the chosen tokens of some prompts, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks.control_questions import Questions, selected
from sae_lens_multimodal.hooks.gradients import read_hook
from sae_lens_multimodal.hooks.saes import encode_chunks
from sae_lens_multimodal.hooks.selection import Tokens

SCALE_QUANTILE = 0.99
MAX_KEPT = 1 << 22
"""Different values, of all features together, that are kept as they are: 64 MiB with their counts."""
_ROUNDINGS = (16, 18, 20)
"""Bits of a float32's fraction that are given up, one step after the other, where there are more."""
_VALUE_BITS = 31


@dataclass(frozen=True)
class Activity:
    """How active every feature is at the chosen tokens."""

    scale: Float[Tensor, " d_sae"]
    """The 99th percentile of its activations where it is active; 0 where it never is.

    Exact up to `MAX_KEPT` different values of all features together; beyond that within 0.4%, 1.6% or at most 6.3%,
    whichever first leaves so few.
    """
    count: Int[Tensor, " d_sae"]
    """Tokens on which it is active."""


@torch.no_grad()
def measure_activity(
    model: VisionLanguageModel, sae: SAE[Any], hook_name: str, questions: Sequence[Questions], tokens: Tokens
) -> Activity:
    """Measure every feature's activations at the chosen tokens of some prompts."""
    counts = ValueCounts()
    for batch, chosen in selected(model, (batch for some in questions for batch in some.batches), tokens):
        if not bool(chosen.any()):
            continue
        acts = read_hook(model, batch, hook_name)
        for _, encoded in encode_chunks(sae, acts[chosen.to(acts.device)]):
            active = encoded > 0
            counts.add(active.nonzero()[:, 1].cpu(), encoded[active].float().cpu())
    return counts.activity(sae.cfg.d_sae)


class ValueCounts:
    """How often each feature had each value above 0, as sorted keys of feature and value with their counts."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.keys, self.counts = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        self.rounding = 0
        self._new: list[Tensor] = []

    def add(self, features: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> None:
        """Count some activations above 0."""
        # as integers, positive floats are in the same order
        self._new.append(features.long() << _VALUE_BITS | values.view(torch.int32).long())
        if sum(map(len, self._new)) > MAX_KEPT:
            self._merge()

    def _merge(self) -> None:
        keys, new = torch.cat([self.keys, *self._new]), sum(map(len, self._new))
        counts, self._new = torch.cat([self.counts, torch.ones(new, dtype=torch.int64)]), []
        self.keys, self.counts = _together(_rounded(keys, self.rounding), counts)
        for bits in _ROUNDINGS:
            if len(self.keys) <= MAX_KEPT:
                break
            self.rounding = max(self.rounding, bits)
            self.keys, self.counts = _together(_rounded(self.keys, self.rounding), self.counts)

    def activity(self, d_sae: int) -> Activity:
        """Take each feature's percentile: of its values in order, the one that 99% do not exceed."""
        self._merge()
        count = torch.zeros(d_sae, dtype=torch.int64).index_add_(0, self.keys >> _VALUE_BITS, self.counts)
        rank = count.cumsum(0) - count + ((count - 1).clamp(min=0).double() * SCALE_QUANTILE).round().long()
        scale, live = torch.zeros(d_sae), count > 0
        places = torch.searchsorted(self.counts.cumsum(0), rank[live], right=True)
        bits = self.keys[places] & ((1 << _VALUE_BITS) - 1)
        scale[live] = bits.to(torch.int32).view(torch.float32)
        return Activity(scale=scale, count=count)


def _rounded(keys: Int[Tensor, " n"], bits: int) -> Int[Tensor, " n"]:
    """Move values to the middle between those that differ in the last bits only."""
    return keys >> bits << bits | 1 << bits - 1 if bits else keys


def _together(keys: Int[Tensor, " n"], counts: Int[Tensor, " n"]) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Add up the counts of equal keys."""
    found, inverse = keys.unique(return_inverse=True)
    return found, torch.zeros(len(found), dtype=torch.int64).index_add_(0, inverse, counts)


def given_scales(activity: Activity, scales: Mapping[int, float] | None) -> Float[Tensor, " d_sae"]:
    """The measured scales, with given ones in their place."""
    scale = activity.scale.clone()
    for feature, value in (scales or {}).items():
        scale[feature] = value
    return scale
