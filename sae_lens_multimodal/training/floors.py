"""What an SAE must beat: random weights, principal components and raw neurons, as SAE-Lens SAEs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig, TrainingSAE
from torch import Tensor

from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.saes import encode_tokens, inference_sae, reconstruct_tokens
from sae_lens_multimodal.training.tokens import LabelledBatch

FLOORS = ("random", "pca", "neurons")
"""The floors by name."""
_SAMPLE_TOKENS = 16_384
"""Tokens on which the L0 of an SAE and the scale of random weights are measured."""


@dataclass(frozen=True)
class TokenMoments:
    """Mean and covariance of activations, and some of them."""

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    sample: Float[Tensor, "n d"]

    @classmethod
    @torch.no_grad()
    def of(cls, batches: Iterable[LabelledBatch]) -> TokenMoments:
        """Gather them in one pass, in float64.

        Raises:
            ConfigError: there are fewer than two tokens.
        """
        count, shift, kept = 0, None, 0
        total, outer = torch.zeros(0), torch.zeros(0)
        sample: list[Tensor] = []
        for activations, _ in batches:
            if not len(activations):
                continue
            if kept < _SAMPLE_TOKENS:
                sample.append(activations[: _SAMPLE_TOKENS - kept])
                kept += len(sample[-1])
            x = activations.double()
            if shift is None:
                shift = x.mean(0)
                total, outer = torch.zeros_like(shift), torch.zeros(len(shift), len(shift)).to(shift)
            x = x - shift
            count += len(x)
            total += x.sum(0)
            outer += x.T @ x
        if shift is None or count < 2:
            raise ConfigError(f"Got {count} tokens to fit floors to; expected at least two. Give more prompts.")
        mean = total / count
        return cls(shift + mean, outer / count - mean[:, None] * mean, torch.cat(sample))


def build_floors(
    sae: SAE[Any], moments: TokenMoments, names: Sequence[str] = FLOORS, *, seed: int = 0
) -> dict[str, SAE[Any]]:
    """Floors of the same sparsity as an SAE, each an SAE-Lens SAE that takes the same activations.

    - "random": as wide as the SAE; random directions, the same to read and to write, scaled to fit best.
    - "pca": the principal components, each with two features, one for each sign.
    - "neurons": the model's own axes about their mean, again two features each.

    On every token each keeps the k strongest, k being the SAE's own mean L0 on the tokens of `moments`.

    Args:
        sae: the SAE to be judged.
        moments: of the tokens to fit to, best those that the SAE was trained on.
        names: which floors.
        seed: of the random directions.

    Raises:
        ConfigError: an unknown name.
    """
    unknown = [name for name in names if name not in FLOORS]
    if unknown:
        raise ConfigError(f"There is no floor {unknown[0]!r}; expected some of {', '.join(FLOORS)}.")
    sae = inference_sae(sae)
    k = sparsity_of(sae, moments.sample)
    makers = {
        "random": lambda: random_floor(moments, sae.cfg.d_sae, k, seed=seed),
        "pca": lambda: axes_floor(moments, principal_axes(moments), k),
        "neurons": lambda: axes_floor(moments, torch.eye(len(moments.mean)), k),
    }
    return {name: _placed(makers[name](), sae) for name in names}


@torch.no_grad()
def sparsity_of(sae: SAE[Any], activations: Float[Tensor, "n d"]) -> int:
    """The mean number of features that fire on a token, rounded, at least one."""
    counts = [
        (encode_tokens(sae, part.to(sae.W_dec.device, sae.dtype)) != 0).sum(-1).double()
        for part in activations.split(1024)
    ]
    return max(1, round(torch.cat(counts).mean().item()))


def principal_axes(moments: TokenMoments) -> Float[Tensor, "d d"]:
    """The directions of largest variance, one a row, in falling order."""
    values, vectors = torch.linalg.eigh(moments.covariance)
    return vectors[:, values.argsort(descending=True)].T.contiguous()


def axes_floor(moments: TokenMoments, axes: Float[Tensor, "n d"], k: int | None) -> SAE[Any]:
    """An SAE whose features are orthonormal axes about the mean, one for each sign.

    Args:
        moments: where the mean comes from.
        axes: orthonormal directions.
        k: features that fire on a token; None for all, and then a full set of axes reconstructs exactly.
    """
    directions = torch.cat([axes, -axes]).to(moments.mean)
    return _linear_sae(directions.T, directions, moments.mean, None if k is None else min(k, len(axes)))


@torch.no_grad()
def random_floor(moments: TokenMoments, d_sae: int, k: int, *, seed: int = 0) -> SAE[Any]:
    """An SAE of random unit directions; its decoder is scaled as fits the sample best (least squares, one number)."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(d_sae, len(moments.mean), generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(moments.mean)
    sae = _linear_sae(directions.T, directions, moments.mean, min(k, d_sae))
    centred = moments.sample.double() - moments.mean
    guess = reconstruct_tokens(sae, moments.sample.to(sae.dtype)).double() - moments.mean
    size = guess.square().sum()
    if size > 0:
        sae.W_dec.data *= ((centred * guess).sum() / size).to(sae.dtype)
    return sae


@torch.no_grad()
def with_random_encoder(sae: TrainingSAE[Any], *, seed: int = 0) -> TrainingSAE[Any]:
    """Freeze a training SAE's encoder at random unit directions, in place: only its decoder learns.

    Given to the runner as `override_sae`, it is trained like any other: on the same tokens, as often, by the same
    optimiser. What it reaches is owed to the decoder, not to features that were found.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(sae.W_enc.shape, generator=generator)
    sae.W_enc.copy_((directions / directions.norm(dim=0, keepdim=True)).to(sae.W_enc))
    for name, parameter in sae.named_parameters():
        parameter.requires_grad_(name in ("W_dec", "b_dec"))
    return sae


def _linear_sae(encoder: Tensor, decoder: Tensor, mean: Tensor, k: int | None) -> SAE[Any]:
    """An SAE with a given encoder [d, n], decoder [n, d] and decoder bias."""
    n, d = decoder.shape
    sae: SAE[Any] = (
        StandardSAE(StandardSAEConfig(d_in=d, d_sae=n)) if k is None else TopKSAE(TopKSAEConfig(d_in=d, d_sae=n, k=k))
    )
    state = {"W_enc": encoder, "W_dec": decoder, "b_dec": mean, "b_enc": torch.zeros(n)}
    sae.load_state_dict({name: tensor.to("cpu", torch.float32) for name, tensor in state.items()})
    return sae.to(mean.device).eval()


def _placed(floor: SAE[Any], sae: SAE[Any]) -> SAE[Any]:
    """Put a floor where the SAE is, and let it name the same model and hook."""
    for name in ("model_name", "hook_name"):
        floor.cfg.metadata[name] = sae.cfg.metadata[name]
    return floor.to(sae.W_dec.device)
