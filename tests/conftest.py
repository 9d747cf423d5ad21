"""What all tests share: the shipped tiny model, loaded once, and pictures of its world."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.scenes import make_scene, model_folder

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> VisionLanguageModel:
    """The shipped tiny LLaVA-NeXT in float32 on the CPU. Tests must leave it as it was."""
    return load_model(model_folder(), dtype=torch.float32)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Six pictures of the synthetic world, of several shapes."""
    return [make_scene(seed).image.convert("RGB") for seed in range(6)]
