"""Random models of every registered family."""

from __future__ import annotations

from typing import Any

import pytest

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.registry import find_family, registered_families


@pytest.fixture(scope="session", params=registered_families())
def family_name(request: pytest.FixtureRequest) -> str:
    """Every registered family in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def random_model(family_name: str) -> VisionLanguageModel:
    """A tiny random model of the family, with eager attention so that every hook exists. Leave it as it was."""
    module, processor = find_family(family_name).random_model(seed=0)
    module.set_attn_implementation("eager")
    return load_model(module, processor=processor)


@pytest.fixture(scope="session")
def plain_module(family_name: str) -> Any:
    """The same weights without nnsight."""
    module, _ = find_family(family_name).random_model(seed=0)
    module.set_attn_implementation("eager")
    return module


@pytest.fixture(scope="session")
def llava() -> VisionLanguageModel:
    """A tiny random LLaVA-NeXT with transformers' default attention."""
    module, processor = find_family("llava_next").random_model(seed=1)
    return load_model(module, processor=processor)
