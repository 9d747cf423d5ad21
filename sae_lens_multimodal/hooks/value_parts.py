"""What a hook's values are made of by an SAE (features, bias and error), and a gradient taken along each part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.hooks.saes import (
    CHUNK_TOKENS,
    decoder_directions,
    inference_sae,
    output_scale,
    reconstruct_tokens,
)


@dataclass(frozen=True)
class PartEffects:
    """Effects at the chosen tokens, which are numbered through."""

    token: Int[Tensor, " nodes"]
    feature: Int[Tensor, " nodes"]
    activation: Float[Tensor, " nodes"]
    effect: Float[Tensor, " nodes"]
    error: Float[Tensor, " tokens"]
    bias: Float[Tensor, " tokens"]


@dataclass(frozen=True)
class ValueParts:
    """What the chosen tokens' values are made of: features, bias and error."""

    acts: Float[Tensor, "tokens d_in"]
    reconstruction: Float[Tensor, "tokens d_in"]
    from_features: Float[Tensor, "tokens d_in"]
    """The active features' decoder directions, times their activations."""
    index: Int[Tensor, "nodes 2"]
    """Token and feature of every activation that is not 0."""
    activation: Float[Tensor, " nodes"]
    scale: Float[Tensor, "tokens 1"] | None
    """By how much the SAE's own normalisation stretches what it decodes."""

    @classmethod
    @torch.no_grad()
    def of(cls, sae: SAE[Any], acts: Float[Tensor, "batch seq d_in"], chosen: Bool[Tensor, "batch seq"]) -> ValueParts:
        """Take the chosen tokens' values apart."""
        plain, some = inference_sae(sae), acts[chosen.to(acts.device)]
        directions = _directions(plain)
        pieces: list[tuple[Tensor, ...]] = []
        for start in range(0, len(some), CHUNK_TOKENS):
            z, rebuilt = _coded(plain, some[start : start + CHUNK_TOKENS])
            index = z.nonzero()
            index[:, 0] += start
            pieces.append((rebuilt.to(some), (z @ directions).to(some), index.to(some.device), z[z != 0].to(some)))
        rebuilt, features, index, activation = (torch.cat(one) for one in zip(*pieces, strict=True))
        scale = output_scale(plain, some)
        scale = None if scale is None else scale.to(some)
        return cls(some, rebuilt, features if scale is None else features * scale, index, activation, scale)

    @torch.no_grad()
    def effects(self, sae: SAE[Any], gradient: Float[Tensor, "tokens d_in"]) -> PartEffects:
        """Take the gradient along every part."""
        directions = _directions(inference_sae(sae)).to(gradient)
        stretched = gradient if self.scale is None else gradient * self.scale
        token, feature = self.index.unbind(-1)
        slopes = torch.cat(
            [
                _slopes(directions, stretched, token[at : at + CHUNK_TOKENS], feature[at : at + CHUNK_TOKENS])
                for at in range(0, len(token), CHUNK_TOKENS)
            ]
            or [gradient.new_zeros(0)]
        )
        return PartEffects(
            token=token.cpu(),
            feature=feature.cpu(),
            activation=self.activation.cpu(),
            effect=-(self.activation * slopes).cpu(),
            error=-((self.acts - self.reconstruction) * gradient).sum(-1).cpu(),
            bias=-((self.reconstruction - self.from_features) * gradient).sum(-1).cpu(),
        )

    @torch.no_grad()
    def added_by(self, sae: SAE[Any], nodes: Bool[Tensor, " nodes"]) -> Float[Tensor, "tokens d_in"]:
        """What some of the nodes add to the value of each token."""
        directions = _directions(inference_sae(sae)).to(self.acts)
        total = torch.zeros_like(self.acts)
        token, feature = self.index[nodes].unbind(-1)
        activation = self.activation[nodes]
        for at in range(0, len(token), CHUNK_TOKENS):
            some = slice(at, at + CHUNK_TOKENS)
            total.index_add_(0, token[some], directions[feature[some]] * activation[some, None])
        return total if self.scale is None else total * self.scale


def _coded(sae: SAE[Any], acts: Tensor) -> tuple[Tensor, Tensor]:
    """Feature activations and what they are decoded to, by one call of each."""
    kept: list[Tensor] = []

    def keep(encoded: Tensor) -> Tensor:
        kept.append(encoded)
        return encoded

    rebuilt = reconstruct_tokens(sae, acts, keep)
    return kept[0], rebuilt


def _directions(sae: SAE[Any]) -> Float[Tensor, "d_sae d_in"]:
    return decoder_directions(sae, range(sae.cfg.d_sae)).detach()


def _slopes(directions: Tensor, gradient: Tensor, token: Tensor, feature: Tensor) -> Tensor:
    """By how much the metric rises with one unit of each node."""
    return (directions[feature] * gradient[token]).sum(-1)
