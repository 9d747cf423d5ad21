"""The tiny model, and a store of features that are known."""

from __future__ import annotations

import pytest

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.scenes import model_folder
from tests.autointerp.sample import write_store


@pytest.fixture(scope="session")
def model() -> VisionLanguageModel:
    return load_model(model_folder())


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, model: VisionLanguageModel) -> FeatureStore:
    return write_store(tmp_path_factory.mktemp("store") / "store", model)
