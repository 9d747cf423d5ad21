"""Vectors of pictures by the model's own vision tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float
from PIL import Image

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks.read import read_activations

Embed: TypeAlias = Callable[[Sequence[Image.Image]], Float[np.ndarray, "n d"]]
"""Gives one vector for each picture."""

TOWER_HOOK = "blocks.0.hook_resid_pre"
"""Where the vision tower's features, projected, enter the language model."""


def tower_embedding(model: VisionLanguageModel, *, batch_size: int = 16) -> Embed:
    """Compare pictures by the model's own vision tower: the mean of the projected tokens of the whole picture.

    Args:
        model: the vision-language model; of LLaVA-NeXT's views only that of the whole picture counts.
        batch_size: pictures at a time.
    """

    def embed(pictures: Sequence[Image.Image]) -> Float[np.ndarray, "n d"]:
        found = []
        for start in range(0, len(pictures), batch_size):
            parts = [
                [{"type": "image", "image": one}, {"type": "text", "text": "."}]
                for one in pictures[start:][:batch_size]
            ]
            batch = model.encode([[{"role": "user", "content": part}] for part in parts])
            values = read_activations(model, batch.to(model.device), TOWER_HOOK)[TOWER_HOOK].float().cpu()
            base = batch.layout.is_image & (batch.layout.tile == 0)
            weights = base.float()[..., None]
            found.append(((values * weights).sum(1) / weights.sum(1)).numpy())
        return np.concatenate(found)

    return embed
