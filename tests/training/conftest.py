"""A tiny model, rows and settings for the training tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.scenes import model_folder, scene_rows
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig, build_config

HOOK = "blocks.1.hook_resid_post"
ConfigMaker = Callable[..., MultimodalSAERunnerConfig[Any]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The model is tiny: threads cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> VisionLanguageModel:
    return load_model(model_folder())


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """Scenes, interleaved pictures and, more often, plain text, as a picture has many more tokens."""
    return list(scene_rows(0, 60, kinds=["scene", "text", "text", "interleaved", "text", "text"]))


@pytest.fixture(scope="session")
def text_rows() -> list[dict[str, Any]]:
    return list(scene_rows(1, 12, kinds=["text"]))


@pytest.fixture
def make_config(tmp_path: Path, model: VisionLanguageModel) -> ConfigMaker:
    """Settings of a run of a few steps that writes below the test's folder."""

    def make(**changes: Any) -> MultimodalSAERunnerConfig[Any]:
        sae = {"architecture": "topk", "d_sae": 64, "k": 4, **changes.pop("sae", {})}
        sae = {name: value for name, value in sae.items() if value is not None}
        settings: dict[str, Any] = {
            "model_name": model.name,
            "hook_name": HOOK,
            "token_shares": {"image": 0.5, "text": 0.5},
            "train_batch_size_tokens": 64,
            "training_tokens": 64 * 4,
            "n_batches_in_buffer": 4,
            "store_batch_size_prompts": 4,
            "n_eval_batches": 1,
            "eval_losses": False,
            "lr": 1e-3,
            "device": "cpu",
            "output_path": str(tmp_path / "sae"),
            "checkpoint_path": None,
            "progress": False,
        }
        return build_config({**settings, **changes, "sae": sae})

    return make
