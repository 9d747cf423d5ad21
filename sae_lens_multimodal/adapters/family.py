"""What the package must know about a family of vision-language models: its modules, and how pictures become tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Int, Int8, Int64
from PIL import Image
from torch import Tensor

from sae_lens_multimodal.adapters.hook_points import HookPoint


@dataclass(frozen=True)
class ImageTokens:
    """How the placeholder tokens of one picture lie in it, in the order of the sequence."""

    modality: Int8[np.ndarray, " n"]
    """`Modality` of each placeholder: IMAGE or NEWLINE."""
    boxes: Float32[np.ndarray, "n 4"]
    """`x0, y0, x1, y1` in pixels of the original; NaN where not IMAGE."""
    tile: Int64[np.ndarray, " n"]
    """0 for the view of the whole picture, 1 and up for its tiles; -1 where none."""

    def __len__(self) -> int:
        """Return the number of placeholders."""
        return len(self.modality)


class Family(ABC):
    """One family of models. Subclasses are final: one file each, registered in `families.py`."""

    model_type: ClassVar[str]
    """`config.model_type` of its models."""
    media_keys: ClassVar[tuple[str, ...]]
    """The model inputs that carry pictures."""
    media_modules: ClassVar[tuple[str, ...]]
    """Paths of the modules whose batch dimension counts pieces of pictures instead of prompts."""
    old_paths: ClassVar[Mapping[str, str]]
    """Beginnings of module paths in older versions of transformers, and what they are now."""
    final_norm: ClassVar[str]
    """Path of the norm before the unembedding."""
    unembedding: ClassVar[str]
    """Path of the unembedding."""

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - any transformers config and processor
        """Keep a model's configuration and processor."""
        self.config = config
        self.processor = processor

    @property
    @abstractmethod
    def n_layers(self) -> int:
        """Number of blocks of the language model."""

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the language model's residual stream."""

    @property
    @abstractmethod
    def image_token_id(self) -> int:
        """The token that stands for every patch of a picture."""

    @property
    @abstractmethod
    def image_token(self) -> str:
        """That token as text."""

    @abstractmethod
    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""

    @abstractmethod
    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the placeholders of a picture of this size lie in it, as the processor and the model have it."""

    @abstractmethod
    def merge_media(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Join the picture inputs of several batches; each may have none."""

    @abstractmethod
    def media_rows(self, inputs: Mapping[str, Any]) -> int:
        """Return how many rows the modules in `media_modules` see for these model inputs."""

    @abstractmethod
    def position_ids(self, attention_mask: Int[Tensor, "batch seq"]) -> Int64[Tensor, "batch seq"] | None:
        """Return the positions that leave padding uncounted; None where the model derives them itself."""

    @classmethod
    @abstractmethod
    def random_model(cls, seed: int = 0) -> tuple[Any, Any]:
        """Return a tiny model with random weights and its processor, made offline, for tests."""

    def processor_images(self, images: Sequence[Sequence[Image.Image]]) -> Any:  # noqa: ANN401 - the processor's form
        """Return the pictures of all prompts as the processor takes them; a flat list unless overridden."""
        return [image for row in images for image in row] or None

    def scan_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return model inputs for a forward on fake tensors: what the model's control flow reads must stay plain."""
        return dict(inputs)
