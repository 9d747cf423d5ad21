"""A random sparse autoencoder for the tiny model, some prompts, and small stores written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.scenes import scene_rows
from sae_lens_multimodal.types import Modality

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="session")
def sae(model: VisionLanguageModel) -> SAE[Any]:
    config = TopKSAEConfig(d_in=model.d_model, d_sae=96, k=6)
    config.metadata.hook_name = HOOK
    sae = TopKSAE(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return sae


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """Some rows of all kinds; a picture that is asked about twice, and one that cannot be opened."""
    rows = list(scene_rows(3, 15))
    again = [{**rows[6], "messages": rows[0]["messages"]}] if len(rows[0]["images"]) == len(rows[6]["images"]) else []
    broken = {**rows[0], "images": [{"bytes": b"no picture", "path": None}] * len(rows[0]["images"])}
    return [*rows[:9], broken, *rows[9:], *again]


@pytest.fixture
def layout() -> TokenLayout:
    """Control, two patches, newline, two patches, newline, three words; the picture is 16 pixels square."""
    labels = [Modality.SPECIAL, *[Modality.IMAGE, Modality.IMAGE, Modality.NEWLINE] * 2, *[Modality.TEXT] * 3]
    boxes = np.full((len(labels), 4), np.nan, dtype=np.float32)
    boxes[[1, 2, 4, 5]] = [[0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16], [8, 8, 16, 16]]
    pictured = [0 if label in (Modality.IMAGE, Modality.NEWLINE) else -1 for label in labels]
    return TokenLayout.from_arrays(
        {"modality": labels, "boxes": boxes, "image_index": pictured, "tile": pictured, "image_sizes": [[16, 16]]}
    )


@pytest.fixture
def tokens() -> list[str]:
    """One string for every token of `layout`."""
    return ["<s>", "<i>", "<i>", "<n>", "<i>", "<i>", "<n>", "what", "is", "this"]


@pytest.fixture
def new_folder(tmp_path: Path) -> Callable[[], Path]:
    """Gives a folder that does not exist yet."""
    made: list[Path] = []

    def new() -> Path:
        made.append(tmp_path / f"store-{len(made)}")
        return made[-1]

    return new
