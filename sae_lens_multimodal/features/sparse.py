"""The non-zero feature activations of one batch of prompts, and what they come to per prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int8, Int32, Int64
from torch import Tensor

from sae_lens_multimodal.types import Modality

EncodeChunks: TypeAlias = Callable[[Tensor], Iterable[tuple[slice, Tensor]]]
"""Encodes tokens [n, d] a few at a time: which of them, and their feature activations."""


@dataclass(frozen=True)
class SparseActivations:
    """Every activation above zero on image and text tokens, ordered by prompt, then position.

    Memory: 32 bytes for each of `tokens of the batch * mean features active on a token` entries.
    """

    n_prompts: int
    n_features: int
    prompt: Int64[Tensor, "entries"]
    """Row of the batch."""
    modality: Int64[Tensor, "entries"]
    """0 for image, 1 for text."""
    position: Int32[Tensor, "entries"]
    """Token in the prompt, padding before it not counted."""
    feature: Int64[Tensor, "entries"]
    """Place among the harvested features."""
    value: Float32[Tensor, "entries"]


@dataclass(frozen=True)
class PromptMeasures:
    """What every feature does in every prompt of a batch, by modality (0 image, 1 text)."""

    n_tokens: Int64[Tensor, "prompts 2"]
    """Tokens that count; not by feature."""
    peak: Float32[Tensor, "prompts 2 features"]
    """Largest activation; 0 where it does not fire."""
    total: Float64[Tensor, "prompts 2 features"]
    """Sum of activations."""

    @cached_property
    def fires(self) -> tuple[Int64[Tensor, "pairs"], Int64[Tensor, "pairs"], Int64[Tensor, "pairs"]]:
        """Prompt, modality and feature of all that fires, ordered by them; of a wide dictionary little does."""
        prompt, modality, feature = (self.peak > 0).nonzero(as_tuple=True)
        return prompt, modality, feature

    def mean_at(self, *index: Int64[Tensor, "n"] | int | slice) -> Float32[Tensor, "n *rest"]:
        """Mean activation over the tokens of each modality, 0 where there are none, of some entries of `total`."""
        n_tokens = self.n_tokens.clamp(min=1)[:, :, None].expand_as(self.total)
        return (self.total[index] / n_tokens[index]).float()


def kept_tokens(modality: Int8[Tensor, "b s"]) -> tuple[Bool[Tensor, "b s"], Int32[Tensor, "b s"]]:
    """Which tokens count (image and text), and the place of every token once padding before it is gone."""
    kept = (modality == Modality.IMAGE.value) | (modality == Modality.TEXT.value)
    places = (modality != Modality.PADDING.value).int().cumsum(1, dtype=torch.int32) - 1
    return kept, places


@torch.no_grad()
def sparse_activations(
    encode_chunks: EncodeChunks,
    activations: Float[Tensor, "b s *d"],
    modality: Int8[Tensor, "b s"],
    *,
    n_features: int,
    features: Int64[Tensor, "features"] | None,
) -> tuple[SparseActivations, PromptMeasures]:
    """Encode the tokens that count, a chunk at a time, and keep what is above zero.

    Args:
        encode_chunks: Yields slices of the tokens with their dense feature activations.
        activations: What the hook read, padding included; heads are joined.
        modality: `Modality` of every token.
        n_features: How many features are wanted.
        features: Which they are; None for all that are encoded.
    """
    device = activations.device
    modality = modality.to(device)
    kept, places = kept_tokens(modality)
    prompt, column = kept.nonzero(as_tuple=True)
    labels = (modality[prompt, column] == Modality.TEXT.value).long()
    entries = [(prompt[:0], prompt[:0], torch.zeros(0, device=device))]
    for chunk, dense in encode_chunks(activations[prompt, column].flatten(1)):
        token, feature, value = above_zero(dense, features)
        entries.append(((token + chunk.start).to(device), feature.to(device), value.to(device)))
    token, feature, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
    sparse = SparseActivations(
        modality.shape[0],
        n_features,
        prompt[token],
        labels[token],
        places[prompt[token], column[token]],
        feature,
        value,
    )
    n_tokens = torch.bincount(prompt * 2 + labels, minlength=2 * sparse.n_prompts).view(-1, 2)
    return sparse, _measures(sparse, n_tokens)


def above_zero(
    encoded: Float[Tensor, "tokens d_sae"], features: Int64[Tensor, "features"] | None
) -> tuple[Int64[Tensor, "entries"], Int64[Tensor, "entries"], Float32[Tensor, "entries"]]:
    """Tokens, places among the wanted features and values of what is above zero, by token; dense or sparse."""
    if not encoded.is_sparse:
        chosen = encoded if features is None else encoded[:, features.to(encoded.device)]
        token, feature = chosen.nonzero(as_tuple=True)
        value = chosen[token, feature].float()
    else:
        # A top-k SAE gives k entries to a token, in the order of the tokens.
        (token, feature), value = encoded._indices(), encoded._values().float()
        if features is not None:
            place = torch.full((encoded.shape[1],), -1, dtype=torch.int64, device=encoded.device)
            place[features.to(encoded.device)] = torch.arange(len(features), device=encoded.device)
            feature = place[feature]
    kept = ((value > 0) & (feature >= 0)).nonzero().squeeze(1)
    return token[kept], feature[kept], value[kept]


def _measures(batch: SparseActivations, n_tokens: Int64[Tensor, "prompts 2"]) -> PromptMeasures:
    shape, device = (batch.n_prompts, 2, batch.n_features), batch.value.device
    place = (batch.prompt * 2 + batch.modality) * batch.n_features + batch.feature
    peak = torch.zeros(shape, dtype=torch.float32, device=device)
    peak.view(-1).scatter_reduce_(0, place, batch.value, reduce="amax")
    total = torch.zeros(shape, dtype=torch.float64, device=device)
    total.view(-1).index_add_(0, place, batch.value.double())
    return PromptMeasures(n_tokens, peak, total)
