"""What a feature writes: the output tokens that its decoder direction makes likelier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor, nn

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SAEMismatchError
from sae_lens_multimodal.hooks.saes import check_features, decoder_directions, inference_sae

_CHUNK_FEATURES = 64


@torch.no_grad()
def top_output_tokens(
    model: VisionLanguageModel, sae: SAE[Any], features: Sequence[int], k: int = 10, *, largest: bool = True
) -> list[list[tuple[str, float]]]:
    """The output tokens that each feature makes likelier (or, with `largest=False`, less likely) by itself.

    A feature's decoder direction is passed through the model's final norm and unembedding, as if it reached the end of
    the residual stream unchanged. Of the norm only its weights are applied (and, in a LayerNorm, the centring): its
    division by the size of the stream is left out, so the numbers are logits for one unit of the feature in a stream
    whose mean square is 1. From each the mean over the vocabulary is taken off, which no probability depends on.

    Args:
        model: The model.
        sae: An SAE on the model's residual stream, or on what is added to it.
        features: The features asked about.
        k: Tokens to a feature.
        largest: Whether to give the tokens made likelier, or those made less likely.

    Returns:
        For each feature its tokens as readable text, with their logits, the strongest first.

    Raises:
        FeatureError: the SAE has no such feature.
        SAEMismatchError: the SAE's width is not that of the residual stream.
        ConfigError: `k` is below 1.
    """
    if k < 1:
        raise ConfigError(f"Got k={k}; expected 1 or more.")
    if sae.cfg.d_in != model.d_model:
        raise SAEMismatchError(
            f"The SAE has d_in={sae.cfg.d_in}, but the residual stream of {model.name} has width {model.d_model}; "
            "output tokens exist only for SAEs on the residual stream."
        )
    chosen = check_features(sae, features)
    plain = inference_sae(sae)
    found: list[list[tuple[str, float]]] = []
    for start in range(0, len(chosen), _CHUNK_FEATURES):
        logits = output_logits(model, decoder_directions(plain, chosen[start : start + _CHUNK_FEATURES]))
        top = logits.topk(min(k, logits.shape[-1]), dim=-1, largest=largest)
        for values, ids in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            found.append(list(zip(model.token_strings(ids), values, strict=True)))
    return found


@torch.no_grad()
def output_logits(model: VisionLanguageModel, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocabulary"]:
    """Logits that directions of the residual stream add; see `top_output_tokens` for what is computed."""
    norm: nn.Module = model._module.get_submodule(model.family.final_norm)
    unembedding: nn.Module = model._module.get_submodule(model.family.unembedding)
    weight = next(unembedding.parameters())
    normed = norm_weighted(norm, directions.to(weight.device)).to(weight.dtype)
    # The unembedding's bias is nothing that the direction adds, and rows beyond the tokenizer's are never meant.
    logits = (unembedding(normed) - unembedding(torch.zeros_like(normed[:1]))).float()
    logits = logits[:, : len(model.tokenizer)]
    return logits - logits.mean(dim=-1, keepdim=True)


def norm_weighted(norm: nn.Module, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """Apply a norm's weights to directions without its division, whatever the norm's formula for them is.

    A norm of any kind divides by a size, multiplies by weights and may centre and shift. Fed the direction scaled to a
    mean square of 1, it divides by (almost) 1; what is taken off is the shift.
    """
    parameter = next(norm.parameters(), torch.zeros(0))
    sized = directions.to(parameter.device, torch.promote_types(directions.dtype, torch.float32))
    if isinstance(norm, nn.LayerNorm):
        sized = sized - sized.mean(dim=-1, keepdim=True)
    size = sized.pow(2).mean(dim=-1, keepdim=True).sqrt().clamp(min=torch.finfo(sized.dtype).tiny)
    # At a mean square of 1 the epsilon in the norm's root does not count; at that of a unit vector it would.
    normed = norm((sized / size).to(parameter.dtype)).to(sized.dtype)
    shift = norm(torch.zeros_like(sized[:1]).to(parameter.dtype)).to(sized.dtype)
    return (normed - shift) * size
