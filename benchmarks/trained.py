"""An SAE on the tiny model, trained as the demo trains it and kept in the temporary folder for the next run."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_lens import SAE

from sae_lens_multimodal.demo.run import train_sae
from sae_lens_multimodal.demo.settings import DemoSettings
from sae_lens_multimodal.scenes import model_folder


def cached_sae(model: Any, hook_name: str, tokens: int) -> SAE[Any]:  # noqa: ANN401 - a VisionLanguageModel
    """Train on so many tokens, or load what an earlier run trained on the same weights."""
    weights = hashlib.sha256((model_folder() / "model.safetensors").read_bytes()).hexdigest()[:12]
    name = f"{weights}-{hook_name}-{tokens}"
    folder = Path(tempfile.gettempdir()) / "sae-lens-multimodal-benchmarks" / name
    if (folder / "cfg.json").is_file():
        return SAE.load_from_disk(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return train_sae(model, replace(DemoSettings(), hook_name=hook_name, training_tokens=tokens), folder)
