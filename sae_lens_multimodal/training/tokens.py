"""Which tokens of a prompt are trained on, and their activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.training.config import ImageTokens
from sae_lens_multimodal.types import Modality

GROUP_OF_MODALITY = {Modality.IMAGE: "image", Modality.NEWLINE: "image", Modality.TEXT: "text"}
"""To which share a token counts: separators between rows of patches belong to the image."""


class LabelledBatch(NamedTuple):
    """Activations of some tokens, and what the tokens are."""

    activations: Float[Tensor, "n d"]
    """Activations at the hook."""
    modality: Int[Tensor, " n"]
    """`Modality` of each token, int8, on the CPU."""


@dataclass(frozen=True)
class TokenChoice:
    """Which tokens are taken; special tokens and padding never are."""

    image_tokens: ImageTokens = "all"
    """All image tokens, or those of the base view or of the tiles only."""
    newline_tokens: bool = False
    """Whether separators between rows of patches are taken too, where their part of the image is."""
    excluded_ids: tuple[int, ...] = ()
    """Token ids to leave out besides."""

    def select(self, layout: TokenLayout, input_ids: Int[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
        """Mark the tokens that are taken, from where each comes from and from its id."""
        of_image = layout.modality == Modality.IMAGE
        if self.newline_tokens:
            of_image = of_image | (layout.modality == Modality.NEWLINE)
        if self.image_tokens == "base":
            of_image = of_image & (layout.tile == 0)
        elif self.image_tokens == "tiles":
            of_image = of_image & (layout.tile != 0)
        chosen = of_image | (layout.modality == Modality.TEXT)
        if self.excluded_ids:
            chosen = chosen & ~torch.isin(input_ids, torch.tensor(self.excluded_ids))
        return chosen


@torch.no_grad()
def read_tokens(
    model: VisionLanguageModel, batch: EncodedBatch, hook_name: str, choice: TokenChoice, *, autocast: bool = False
) -> LabelledBatch:
    """Run a model up to a hook, and keep the tokens that are chosen.

    Raises:
        ConfigError: the hook does not give one vector for each token, or not finite numbers.
    """
    device = torch.device(model.device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        activations = read_activations(model, batch, hook_name)[hook_name]
    chosen = choice.select(batch.layout, batch["input_ids"].cpu())
    if activations.ndim < 3 or activations.shape[:2] != chosen.shape:
        raise ConfigError(
            f"{hook_name} gives values of shape {tuple(activations.shape)} for prompts of shape {tuple(chosen.shape)}; "
            "choose a hook of the language model, which has one vector for each token."
        )
    rows = activations.flatten(2)[chosen.to(activations.device)]
    if not torch.isfinite(rows).all():
        raise ConfigError(
            f"Activations at {hook_name} are not finite in {rows.dtype}; load the model with more range, such as "
            "model_from_pretrained_kwargs={'dtype': 'bfloat16'}."
        )
    return LabelledBatch(rows, batch.layout.modality[chosen].cpu())
