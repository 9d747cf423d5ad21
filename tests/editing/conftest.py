"""A tiny model with random weights and biases, prompts about two pictures, and an edit of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.random_models import random_llava_next
from sae_lens_multimodal.editing.compute import compute_edit
from sae_lens_multimodal.editing.edit import Edit
from sae_lens_multimodal.editing.settings import EditSettings

Chat = list[dict[str, Any]]
TARGET = "red"
LONG = EditSettings(max_steps=150, clamp=None, learning_rate=0.3, end=False)


def ask(text: str = "what is this ?", colour: tuple[int, int, int] | None = (200, 30, 40)) -> Chat:
    pictures = [] if colour is None else [{"type": "image", "image": Image.new("RGB", (96, 48), colour)}]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def random_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> VisionLanguageModel:
    """A random model whose down projections have biases, as some families' have."""
    module, processor = random_llava_next(seed)
    for number in range(2):
        layer = module.get_submodule(f"model.language_model.layers.{number}.mlp.down_proj")
        assert isinstance(layer, nn.Linear)
        layer.bias = nn.Parameter(torch.randn(layer.out_features, generator=torch.Generator().manual_seed(number)))
    return load_model(module.to(dtype), processor=processor)


@pytest.fixture(scope="module")
def tiny() -> VisionLanguageModel:
    return random_model()


@pytest.fixture(scope="module")
def found(tiny: VisionLanguageModel) -> Edit:
    """Taught at one prompt, so that k is that prompt's own key."""
    return compute_edit(tiny, [ask()], TARGET, constraint=-1, layers=0, settings=LONG)
