"""A tiny random LLaVA-NeXT, prompts for it, and SAEs with random weights."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.random_models import random_llava_next
from tests.hooks.hook_samples import HOOK, SAE, build_sae


@pytest.fixture(scope="session")
def model() -> VisionLanguageModel:
    module, processor = random_llava_next()
    return load_model(module, processor=processor)


@pytest.fixture(scope="session")
def conversations() -> list[list[dict[str, Any]]]:
    """A wide picture, text alone, and two pictures."""

    def picture(size: tuple[int, int], colour: tuple[int, int, int]) -> dict[str, Any]:
        return {"type": "image", "image": Image.new("RGB", size, colour)}

    def ask(*content: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": list(content)}]

    words = {"type": "text", "text": "what is this ?"}
    return [
        ask(picture((90, 40), (200, 10, 10)), words),
        ask({"type": "text", "text": "a red circle and a blue square ?"}),
        ask(picture((40, 40), (0, 200, 0)), {"type": "text", "text": "and"}, picture((40, 80), (0, 0, 250)), words),
    ]


@pytest.fixture(scope="session")
def batch(model: VisionLanguageModel, conversations: list[list[dict[str, Any]]]) -> EncodedBatch:
    return model.encode(conversations)


@pytest.fixture(scope="session")
def sae(model: VisionLanguageModel) -> SAE[Any]:
    return build_sae(metadata={"hook_name": HOOK, "model_name": model.name})


@pytest.fixture(scope="session")
def active(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> list[int]:
    """The features that are active on most of the image tokens, the most frequent first."""
    from sae_lens_multimodal.hooks.read import read_activations

    encoded = sae.encode(read_activations(model, batch, HOOK)[HOOK][batch.layout.is_image])
    return [int(feature) for feature in (encoded > 0).sum(0).argsort(descending=True)[:4]]
