"""Measures how well an SAE reconstructs a model's activations, image and text tokens apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.batches import encoded_batches
from sae_lens_multimodal.data.rows import Prompt
from sae_lens_multimodal.hooks.saes import check_sae, inference_sae
from sae_lens_multimodal.training.metrics import MODALITIES, ModalityMetrics, ReconstructionTotals, as_report
from sae_lens_multimodal.training.tokens import LabelledBatch, TokenChoice, read_tokens

_CHUNK_TOKENS = 4096
"""Tokens that are encoded at once, at most."""
_DENSE_ELEMENTS = 1 << 26
"""So many dense feature activations exist at a time: 256 MiB in float32."""


def evaluate_reconstruction(
    model: VisionLanguageModel,
    sae: SAE[Any],
    prompts: Iterable[Prompt],
    *,
    hook_name: str | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    context_size: int | None = None,
    choice: TokenChoice | None = None,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Reconstruct the activations of prompts, and report on each modality.

    Args:
        model: the model the SAE was trained on.
        sae: a trained SAE. One in training is measured as it would be saved.
        prompts: what `read_prompts` yields, best ones the SAE has not seen.
        hook_name: where to read; None for the SAE's own hook.
        max_tokens: stop after so many tokens of both modalities together; None for all prompts.
        batch_size: prompts that the model is given at once.
        context_size: longer prompts are left out; None for any length.
        choice: which tokens count; None for all image and text tokens.
        progress: whether to draw a progress bar on stderr.

    Returns:
        For "image" and "text" what `ModalityMetrics` lists; None where there is nothing to measure.

    Raises:
        SAEMismatchError: the SAE does not fit the model's hook.
    """
    sae = inference_sae(sae)
    name = check_sae(model, sae, hook_name)
    batches = encoded_batches(model, prompts, batch_size=batch_size, context_size=context_size)
    read = (read_tokens(model, batch.batch, name, choice or TokenChoice()) for batch in batches)
    limited = _at_most(read, max_tokens)
    return as_report(measure(sae, tqdm(limited, desc="Evaluating", unit="batch", disable=not progress)))


def measure(
    sae: SAE[Any], batches: Iterable[LabelledBatch], scale: Callable[[Tensor], Tensor] | None = None
) -> dict[str, ModalityMetrics]:
    """Metrics of each modality over batches of labelled activations.

    Args:
        sae: the SAE.
        batches: activations with the modality of each token.
        scale: what training does to activations before the SAE sees them; the metrics are those of the scaled ones.
    """
    totals = measure_several({"sae": sae}, batches, scale)["sae"]
    return {name: total.metrics() for name, total in totals.items()}


@torch.no_grad()
def measure_several(
    saes: Mapping[str, SAE[Any]],
    batches: Iterable[LabelledBatch],
    scale: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, dict[str, ReconstructionTotals]]:
    """Running sums of each modality for several SAEs that read the same activations, in one pass; see `measure`."""
    totals = {name: {modality: ReconstructionTotals() for modality in MODALITIES} for name in saes}
    for activations, modality in batches:
        for name, code in MODALITIES.items():
            rows = activations[(modality == code).to(activations.device)]
            for key, sae in saes.items():
                size = max(1, min(_CHUNK_TOKENS, _DENSE_ELEMENTS // sae.cfg.d_sae))
                for chunk in rows.split(size) if len(rows) else ():
                    x = chunk.to(sae.W_dec.device, sae.dtype)
                    _add(totals[key][name], sae, scale(x) if scale is not None else x)
    return totals


def _add(totals: ReconstructionTotals, sae: SAE[Any], x: Float[Tensor, "n d"]) -> None:
    features = sae.encode(x)
    x_hat = sae.decode(features)
    totals.add(x, x_hat, features.to_dense() if features.is_sparse else features)


def _at_most(batches: Iterable[LabelledBatch], max_tokens: int | None) -> Iterator[LabelledBatch]:
    remaining = max_tokens
    for batch in batches:
        if remaining is None:
            yield batch
            continue
        yield LabelledBatch(batch.activations[:remaining], batch.modality[:remaining])
        remaining -= len(batch.modality)
        if remaining <= 0:
            return
