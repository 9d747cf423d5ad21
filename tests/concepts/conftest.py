"""A word's states in a few scenes, gathered once."""

from __future__ import annotations

from typing import Any

import pytest

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.concepts.gather import gather_states
from sae_lens_multimodal.concepts.states import ConceptStates
from sae_lens_multimodal.scenes.concept_truth import caption_rows
from tests.concepts.concept_samples import HOOK, WORD


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    return caption_rows(2**41, 24)


@pytest.fixture(scope="session")
def states(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> ConceptStates:
    return gather_states(model, rows, WORD, hook_name=HOOK, every=True, progress=False)
