"""What the package must know about a family of vision-language models: its modules, and how pictures become tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int8, Int64
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from sae_lens_multimodal.adapters.hook_points import HookPoint
from sae_lens_multimodal.errors import PromptError
from sae_lens_multimodal.types import Modality


@dataclass(frozen=True)
class ImageTokens:
    """How the placeholder tokens of one picture lie in it, in the order of the sequence."""

    modality: Int8[np.ndarray, " n"]
    """`Modality` of each placeholder: IMAGE or NEWLINE."""
    boxes: Float32[np.ndarray, "n 4"]
    """`x0, y0, x1, y1` in pixels of the original; NaN where not IMAGE."""
    tile: Int64[np.ndarray, " n"]
    """0 for the view of the whole picture, 1 and up for its tiles; -1 where none."""
    inexact: str = ""
    """Why tokens have no exact place, where the model resamples or pools patches; empty where boxes are exact."""

    def __len__(self) -> int:
        """Return the number of placeholders."""
        return len(self.modality)


@dataclass(frozen=True)
class Released:
    """Released checkpoints of one structure: what the contract test builds, with few layers and random weights."""

    names: tuple[str, ...]
    """Their names on the hub."""
    structure: Mapping[str, Any]
    """Arguments of the family's `random_model` that decide where tokens lie: sizes, patches, grids, merging."""


class Family(ABC):
    """One family of models. Subclasses are final: one file each, registered in `families.py`."""

    model_type: ClassVar[str]
    """`config.model_type` of its models."""
    media_keys: ClassVar[tuple[str, ...]]
    """The model inputs that carry pictures."""
    token_keys: ClassVar[tuple[str, ...]] = ()
    """Further inputs with a number for each token, such as `token_type_ids`; 0 stands for text and padding."""
    media_modules: ClassVar[tuple[str, ...]]
    """Paths of the modules whose batch dimension counts pieces of pictures instead of prompts."""
    old_paths: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Beginnings of module paths in older versions of transformers, and what they are now."""
    final_norm: ClassVar[str]
    """Path of the norm before the unembedding."""
    unembedding: ClassVar[str]
    """Path of the unembedding."""
    parallel_blocks: ClassVar[bool] = False
    """Whether attention and MLP of a block read the same residual stream, so that it has no `hook_resid_mid`."""
    released: ClassVar[tuple[Released, ...]] = ()
    """Checkpoints known to load by name, by structure."""

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - any transformers config and processor
        """Keep a model's configuration and processor."""
        self.config = config
        self.processor = processor

    @classmethod
    def of(cls, module: Any, processor: Any) -> Family:  # noqa: ANN401 - any transformers model and processor
        """Return the adapter of a loaded model."""
        return cls(module.config, processor)

    @property
    def n_layers(self) -> int:
        """Number of blocks of the language model."""
        return int(self.config.text_config.num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width of the language model's residual stream."""
        return int(self.config.text_config.hidden_size)

    @property
    def image_token_id(self) -> int:
        """The token that stands for every patch of a picture."""
        return int(self.config.image_token_id)

    @property
    def image_token(self) -> str:
        """That token as text."""
        return str(self.processor.image_token)

    @property
    def prompt_token(self) -> str:
        """The text that stands for a whole picture in a prompt, before the processor fills in its tokens.

        Empty where it is not known, so that pictures and placeholders are not compared.
        """
        return self.image_token

    @abstractmethod
    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""

    @abstractmethod
    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the placeholders of a picture of this size lie in it, as the processor and the model have it."""

    def row_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[ImageTokens]:
        """Return `image_tokens` of all pictures of one prompt, by (width, height).

        To be overridden where a picture's tokens depend on how many pictures the prompt has.
        """
        return [self.image_tokens(width, height) for width, height in sizes]

    def is_placeholder(self, ids: Int[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
        """Mark the positions that `image_tokens` describes."""
        return np.asarray(ids == self.image_token_id)

    def markers(self) -> Mapping[int, Modality]:
        """Return the tokens with which the processor encloses or divides a picture: SPECIAL, or NEWLINE after rows."""
        return {}

    def merge_media(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Join the picture inputs of several batches, one after the other; each may have none."""
        return {
            key: torch.cat([torch.as_tensor(batch[key]) for batch in batches if batch.get(key) is not None])
            for key in self.media_keys
            if any(batch.get(key) is not None for batch in batches)
        }

    def media_rows(self, inputs: Mapping[str, Any]) -> int:
        """Return how many pieces of pictures the modules in `media_modules` see, in the finest of their units."""
        pixels = inputs.get("pixel_values")
        return 0 if pixels is None else len(pixels)

    def picture_sizes(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]] | None:
        """Return (width, height) of the original pictures, where model inputs tell them; else None."""
        return None

    def media_axes(self, path: str) -> tuple[int, ...]:
        """Return the dimensions that count pieces of pictures in the tensors of the module at this path.

        There are several where each piece is held against each, as in the scores of pictures that are one sequence;
        none where the pieces are not apart.
        """
        return (0,)

    def position_ids(self, attention_mask: Int[Tensor, "batch seq"]) -> Int64[Tensor, "batch seq"] | None:
        """Return the positions that leave padding uncounted; None where the model derives them itself."""
        return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)

    def positions(self, inputs: Mapping[str, Any]) -> Int64[Tensor, "batch seq"] | None:
        """Return the positions for these model inputs; None where the model derives them itself."""
        return self.position_ids(inputs["attention_mask"])

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - a config; a class with `from_pretrained`
        """Return what loads the processor of a model with this configuration."""
        return AutoProcessor

    def chat_text(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Write a conversation as text, with `prompt_token` for each picture.

        Raises:
            PromptError: the processor has no chat template.
        """
        if self.processor.chat_template is None:
            raise PromptError("the processor has no chat template; set model.processor.chat_template.")
        return str(
            self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def process(
        self,
        messages: Sequence[Sequence[Mapping[str, Any]]],
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        padding_side: str,
    ) -> Mapping[str, Any]:
        """Return what the processor makes of prompts, as tensors by name.

        Args:
            messages: the conversations, for families whose model inputs say more than the text does.
            texts: what `chat_text` makes of them.
            images: their pictures, prompt by prompt.
            padding_side: where shorter prompts are filled up.
        """
        beginning = self.processor.tokenizer.bos_token
        encoded: Mapping[str, Any] = self.processor(
            text=list(texts),
            images=self.processor_images(images),
            return_tensors="pt",
            padding=True,
            padding_side=padding_side,
            # a template that has written the beginning needs none added
            add_special_tokens=beginning is None or not texts[0].startswith(beginning),
            **self.processor_options(),
        )
        return encoded

    def processor_options(self) -> dict[str, Any]:
        """Return further arguments for the processor."""
        return {}

    @classmethod
    @abstractmethod
    def random_model(cls, *args: Any, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see below
        """Return a tiny model with random weights and its processor, made offline, for tests.

        Args:
            *args: `seed`, of the weights; 0 by default.
            **structure: what `released` gives; the widths and the number of layers stay tiny.
        """

    def processor_images(self, images: Sequence[Sequence[Image.Image]]) -> Any:  # noqa: ANN401 - the processor's form
        """Return the pictures of all prompts as the processor takes them; a flat list unless overridden."""
        return [image for row in images for image in row] or None

    def scan_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return model inputs for a forward on fake tensors: what the model's control flow reads must stay plain."""
        return dict(inputs)
