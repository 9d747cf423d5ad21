"""Vectors of pictures and texts: of a CLIP or SigLIP that transformers loads, or of a model's own vision tower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from sae_lens_multimodal.errors import ModelLoadError
from sae_lens_multimodal.features.embedding import TOWER_HOOK, tower_embedding

__all__ = ["TOWER_HOOK", "TextImageEmbedding", "tower_embedding"]


class TextImageEmbedding:
    """A model with one space for texts and pictures, such as CLIP or SigLIP.

    Args:
        model: any transformers model with `get_image_features` and `get_text_features`.
        processor: its processor.
        name: recorded with the results.
        batch_size: pictures or texts at a time.
    """

    def __init__(self, model: torch.nn.Module, processor: Any, *, name: str, batch_size: int = 32) -> None:  # noqa: ANN401
        self.model: Any = model.eval()
        self.processor = processor
        self.name = name
        self.batch_size = batch_size

    @classmethod
    def load(cls, name: str | Path, *, device: str = "cpu", batch_size: int = 32) -> TextImageEmbedding:
        """Load a checkpoint by hub name or folder.

        Raises:
            ModelLoadError: it does not load, or has no common space of texts and pictures.
        """
        from transformers import AutoModel, AutoProcessor

        try:
            model = AutoModel.from_pretrained(str(name)).to(device)
            processor = AutoProcessor.from_pretrained(str(name))
        except (OSError, ValueError, KeyError, ImportError) as error:
            line = " ".join(str(error).split())
            raise ModelLoadError(
                f"{name} does not load ({line[:300]}); expected a CLIP or SigLIP checkpoint."
            ) from error
        if not (callable(getattr(model, "get_image_features", None)) and hasattr(model, "get_text_features")):
            raise ModelLoadError(f"{name} is a {type(model).__name__}; expected a model such as CLIP or SigLIP.")
        return cls(model, processor, name=str(name), batch_size=batch_size)

    def images(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "n d"]:
        """Give one vector of length 1 for each picture."""
        batches = (
            self.processor(images=[one.convert("RGB") for one in part], return_tensors="pt")
            for part in self._parts(pictures)
        )
        return self._vectors(self.model.get_image_features, batches)

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Give one vector of length 1 for each text; long ones are cut as the model demands."""
        batches = (
            self.processor(text=list(part), padding="max_length", truncation=True, return_tensors="pt")
            for part in self._parts(texts)
        )
        return self._vectors(self.model.get_text_features, batches)

    def _parts(self, values: Sequence[Any]) -> Iterator[Sequence[Any]]:
        return (values[start : start + self.batch_size] for start in range(0, len(values), self.batch_size))

    @torch.no_grad()
    def _vectors(self, features: Any, batches: Iterator[Any]) -> Float[np.ndarray, "n d"]:  # noqa: ANN401
        device = next(self.model.parameters()).device
        found = []
        for batch in batches:
            output = features(**batch.to(device))
            values = output if isinstance(output, torch.Tensor) else output.pooler_output
            found.append(torch.nn.functional.normalize(values.float(), dim=-1).cpu().numpy())
        return np.concatenate(found)
