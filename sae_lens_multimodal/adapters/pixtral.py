"""Pixtral's vision tower and processor, which several families have: pictures of their own shape as one sequence."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor
from transformers.image_utils import ChannelDimension
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.pixtral.image_processing_pil_pixtral import (
    PixtralImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.utils.import_utils import is_torchvision_available

from sae_lens_multimodal.adapters.family import Family, ImageTokens
from sae_lens_multimodal.adapters.grid import before_resize, grid_edges, height_width, whole_picture
from sae_lens_multimodal.adapters.hook_points import BlockModules, HookPoint, Part, block_parts, blocks
from sae_lens_multimodal.adapters.modules import (
    LANGUAGE,
    OLD_PATHS,
    PATTERN,
    PROJECTOR,
    RMS_NORMALIZED,
    SCORES,
    UNEMBEDDING,
    VISION,
    head_width,
)
from sae_lens_multimodal.adapters.processors import image_settings
from sae_lens_multimodal.errors import ImageError, LayoutError, UnsupportedModelError
from sae_lens_multimodal.types import Modality

TRANSFORMER = f"{VISION}.transformer"
HELD_AGAINST_EACH = tuple(operation.rpartition(".")[2] for operation in (SCORES, PATTERN))
"""The operations in eager attention whose values are [1, heads, patches, patches]."""


class PixtralFamily(Family, ABC):
    """What the families with Pixtral's vision tower share: a picture keeps its shape.

    A break ends each row of tokens but the last, which the end of the picture ends. In the vision tower all pictures of
    a batch are one sequence of patches: hooks there are [1, patches, d].
    """

    media_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    media_modules: ClassVar[tuple[str, ...]] = (VISION, PROJECTOR)
    old_paths: ClassVar[Mapping[str, str]] = OLD_PATHS
    final_norm: ClassVar[str] = f"{LANGUAGE}.norm"
    unembedding: ClassVar[str] = UNEMBEDDING

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - transformers' own
        """Read the configuration.

        Raises:
            UnsupportedModelError: the vision tower is of another kind.
        """
        super().__init__(config, processor)
        if config.vision_config.model_type != "pixtral":
            raise UnsupportedModelError(
                f"the vision tower is of the kind {config.vision_config.model_type!r}; supported is pixtral."
            )

    @property
    @abstractmethod
    def merged(self) -> int:
        """Patches along one side of the square that a token stands for."""

    def markers(self) -> Mapping[int, Modality]:
        """Return the breaks after rows of tokens, and the end of a picture."""
        return {
            int(self.processor.image_break_token_id): Modality.NEWLINE,
            int(self.processor.image_end_token_id): Modality.SPECIAL,
        }

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the placeholders of a picture of this size lie in it.

        Raises:
            LayoutError: processor and model disagree about the size of patches.
        """
        return pixtral_tokens(self.config, self.processor, width, height, merged=self.merged)

    def media_rows(self, inputs: Mapping[str, Any]) -> int:
        """Return the number of patches of all pictures."""
        sizes = inputs.get("image_sizes")
        patch = self.config.vision_config.patch_size
        return 0 if sizes is None else int((torch.as_tensor(sizes) // patch).prod(dim=-1).sum())

    def media_axes(self, path: str) -> tuple[int, ...]:
        """Return the dimensions that count patches at a module path."""
        if not path.startswith(VISION):
            return (0,)
        if path.startswith(f"{VISION}.patch_conv"):
            # before the pictures are one sequence
            return ()
        if "attention_interface" in path:
            # no patch sees another picture, so that nothing is lost beside the blocks of the pictures' own
            return (2, 3) if any(f".{name}" in path for name in HELD_AGAINST_EACH) else ()
        return (1,)

    def merge_media(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Join pixel values, filled up at the right and the bottom, and sizes."""
        return super().merge_media(filled_up(batches))

    def scan_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give picture sizes as numbers: how many patches there are follows from them."""
        sizes = inputs.get("image_sizes")
        return dict(inputs) if sizes is None else {**inputs, "image_sizes": torch.as_tensor(sizes).tolist()}

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads its processor, which transformers hides where torchvision lacks."""
        return pixtral_processor()


@cache
def pixtral_processor() -> Any:  # noqa: ANN401 - a class with `from_pretrained`
    """Return what loads a Pixtral processor, also where torchvision lacks."""
    return AutoProcessor if is_torchvision_available() else _processor_class()


def _processor_class() -> Any:  # noqa: ANN401 - transformers' own
    """Return the class itself.

    Its module takes a function from the image processor for torchvision that the one for PIL has just the same.
    """
    if is_torchvision_available():
        from transformers import PixtralProcessor as Whole

        return Whole
    module = "transformers.models.pixtral.image_processing_pixtral"
    sys.modules[module] = image_processing_pil_pixtral
    try:
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor
    finally:
        del sys.modules[module]
    return PixtralProcessor


def pixtral_block(vision: Any) -> BlockModules:  # noqa: ANN401 - a transformers config
    """Return the modules of a block of Pixtral's vision tower."""
    return BlockModules(
        ln1="attention_norm",
        attention="attention",
        q="attention.q_proj",
        k="attention.k_proj",
        v="attention.v_proj",
        o="attention.o_proj",
        ln2="ffn_norm",
        mlp="feed_forward",
        mlp_in="feed_forward.gate_proj",
        mlp_gated="feed_forward.up_proj",
        mlp_out="feed_forward.down_proj",
        mid="hidden_states_1",
        normalized=RMS_NORMALIZED,
        scores=SCORES,
        pattern=PATTERN,
        width=vision.hidden_size,
        mlp_width=vision.intermediate_size,
        heads=vision.num_attention_heads,
        key_heads=vision.num_attention_heads,
        head_width=head_width(vision),
    )


def pixtral_hooks(vision: Any) -> tuple[HookPoint, ...]:  # noqa: ANN401 - a transformers config
    """Return the hooks of a Pixtral vision tower, whose values are [1, patches of all pictures, d]."""
    embedding = (
        Part("hook_embed", "ln_pre", side="input", d=vision.hidden_size),
        Part("ln_pre.hook_out", "ln_pre", d=vision.hidden_size),
    )
    return (
        *(part.at(prefix="vision.", path=VISION, tower="vision") for part in embedding),
        *blocks(
            block_parts(pixtral_block(vision)),
            prefix="vision.blocks.",
            path=f"{TRANSFORMER}.layers",
            count=vision.num_hidden_layers,
            tower="vision",
        ),
    )


def pixtral_tokens(config: Any, processor: Any, width: int, height: int, merged: int) -> ImageTokens:  # noqa: ANN401
    """Return how the placeholders of a picture lie in it, row by row; the breaks between rows are other tokens.

    Args:
        config: of the model.
        processor: transformers' own.
        width: of the picture.
        height: of the picture.
        merged: patches along one side of the square that a token stands for.

    Raises:
        ImageError: the picture is too thin.
        LayoutError: processor and model disagree about the size of patches.
    """
    patch = int(config.vision_config.patch_size)
    if (processor.patch_size, processor.spatial_merge_size) != (patch, merged):
        raise LayoutError(
            f"the processor makes patches of {processor.patch_size} pixels in squares of "
            f"{processor.spatial_merge_size}, the model expects {patch} and {merged}; load them from one checkpoint."
        )
    images = image_settings(processor)
    if not images.do_resize or images.do_center_crop:
        raise LayoutError("the image processor leaves pictures in their size or crops them; set its do_resize to True.")
    longest = dict(images.size).get("longest_edge")
    most = (longest, longest) if longest else height_width(images.size)
    token = patch * merged
    # it reads no more of a picture than its shape
    shape = np.empty((3, height, width), dtype=np.bool_)
    new_h, new_w = get_resize_output_image_size(shape, most, (token, token), ChannelDimension.FIRST)
    if not (new_h and new_w):
        raise ImageError(
            f"a picture of {width} x {height} pixels is so thin that the image processor would leave nothing of it; "
            "cut it into parts."
        )
    y = before_resize(grid_edges(new_h // token, token), height, new_h)
    x = before_resize(grid_edges(new_w // token, token), width, new_w)
    return whole_picture(y, x, width, height)


def filled_up(batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return those batches that have pictures, with pixel values filled up to one size at the right and the bottom."""
    present = [dict(batch) for batch in batches if batch.get("pixel_values") is not None]
    height = max((batch["pixel_values"].shape[-2] for batch in present), default=0)
    width = max((batch["pixel_values"].shape[-1] for batch in present), default=0)
    for batch in present:
        pixels = batch["pixel_values"]
        padding = (0, width - pixels.shape[-1], 0, height - pixels.shape[-2])
        batch["pixel_values"] = torch.nn.functional.pad(pixels, padding)
    return present


def random_pixtral_parts(longest_edge: int, patch: int, merged: int) -> tuple[Any, Any]:
    """Return the configuration of a tiny vision tower, and a processor."""
    from transformers import PixtralVisionConfig

    from sae_lens_multimodal.adapters.random_models import CHAT_TEMPLATE, CONTROL, tiny_tower, word_tokenizer

    control = (*CONTROL[:-1], "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = word_tokenizer(control, image_token="[IMG]")
    processor = _processor_class()(
        PixtralImageProcessorPil(size={"longest_edge": longest_edge}, patch_size={"height": patch, "width": patch}),
        tokenizer,
        patch_size=patch,
        spatial_merge_size=merged,
        chat_template=CHAT_TEMPLATE.replace("<image>", "[IMG]"),
    )
    return PixtralVisionConfig(**tiny_tower(longest_edge, patch, hidden_size=32)), processor
