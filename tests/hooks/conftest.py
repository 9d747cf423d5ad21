"""A tiny random LLaVA-NeXT, prompts for it, and SAEs with random weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

with warnings.catch_warnings():
    # SAE-Lens imports a module of TransformerLens that says it is deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from sae_lens import SAE
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.random_models import random_llava_next

HOOK = "blocks.1.hook_resid_post"
MODULE = "model.language_model.layers.1"
D_SAE = 96

MakeSAE = Callable[..., "SAE[Any]"]


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


def build_sae(
    architecture: str = "topk", *, d_in: int = 48, training: bool = False, metadata: dict[str, Any] | None = None, **config: Any
) -> SAE[Any]:
    """An SAE of any architecture with random weights and biases, so that nothing hides behind zeros."""
    if "topk" in architecture:
        config = {"k": 8, **config}
    if architecture == "matryoshka_batchtopk":
        config = {"matryoshka_widths": [D_SAE // 2, D_SAE], **config}
    registry: Any = SAE_TRAINING_CLASS_REGISTRY if training else SAE_CLASS_REGISTRY
    sae_class, config_class = registry[architecture]
    sae_config = config_class(d_in=d_in, d_sae=D_SAE, **config)
    for key, value in (metadata or {}).items():
        setattr(sae_config.metadata, key, value)
    sae = sae_class(sae_config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            scale = 0.1 if name.startswith("b_") or name in ("threshold", "r_mag") else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return sae


@pytest.fixture(scope="session")
def sae() -> SAE[Any]:
    return build_sae(metadata={"hook_name": HOOK, "model_name": "tiny"})


@pytest.fixture(scope="session")
def active(model: VisionLanguageModel, sae: SAE[Any], batch: EncodedBatch) -> list[int]:
    """The features that are active on most of the image tokens, the most frequent first."""
    from sae_lens_multimodal.hooks.read import read_activations

    encoded = sae.encode(read_activations(model, batch, HOOK)[HOOK][batch.layout.is_image])
    return [int(feature) for feature in (encoded > 0).sum(0).argsort(descending=True)[:4]]
