"""The LLaVA-OneVision family: any-resolution tiles, shrunk where there are too many, or one view beside others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, final

import numpy as np
import torch
from PIL import Image

from sae_lens_multimodal.adapters.anyres import Anyres, AnyresFamily, base_boxes, tile_boxes
from sae_lens_multimodal.adapters.family import ImageTokens, Released
from sae_lens_multimodal.adapters.grid import View, join_views, patches_of_view, with_row_ends
from sae_lens_multimodal.adapters.processors import picture_processor
from sae_lens_multimodal.errors import LayoutError

SHRUNK = (
    "the tiles have more patches than the model takes, and their grid is shrunk by bilinear interpolation: a token of "
    "theirs is a weighted mean of up to four patches, and its box holds all of them. The base view is exact."
)
DEFAULT_PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))


@final
class LlavaOnevision(AnyresFamily):
    """LLaVA-OneVision: alone, a picture is a base view and tiles; beside others in a prompt, one view padded to square.

    Boxes are exact, but for tiles of large pictures, whose features are shrunk where they are more than those of nine
    tiles: the layout's `inexact` then says so. Frames of a video can be given as pictures, one view each. A video as
    such is refused: the model pools its frames, and a video token lies in a moment besides a place.
    """

    model_type: ClassVar[str] = "llava_onevision"
    media_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes", "batch_num_images")
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            names=(
                "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
                "llava-hf/llava-onevision-qwen2-7b-ov-hf",
                "llava-hf/llava-onevision-qwen2-72b-ov-hf",
            ),
            structure={"side": 384, "patch": 14, "pinpoints": DEFAULT_PINPOINTS, "max_tiles": 9},
        ),
    )

    @classmethod
    def processor_class(cls, config: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return what loads its processor: without the video part, where torchvision lacks."""
        from transformers import LlavaOnevisionProcessor

        return picture_processor(LlavaOnevisionProcessor)

    def processor_images(self, images: Sequence[Sequence[Image.Image]]) -> Any:  # noqa: ANN401 - the processor's form
        """Return the pictures prompt by prompt: how many there are decides how they are cut."""
        return [list(row) for row in images if row] or None

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the placeholders of a picture of this size lie in it, if it is its prompt's only one.

        Raises:
            LayoutError: processor and model disagree about the views.
        """
        return _alone(width, height, self.geometry(), self._max_tiles())

    def row_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[ImageTokens]:
        """Return the tokens of all pictures of one prompt.

        Raises:
            LayoutError: processor and model disagree about the views.
        """
        if len(sizes) == 1:
            return super().row_tokens(sizes)
        geometry = self.geometry()
        return [_beside_others(width, height, geometry) for width, height in sizes]

    def media_rows(self, inputs: Mapping[str, Any]) -> int:
        """Return the number of views of all pictures, padding left out."""
        sizes, counts = inputs.get("image_sizes"), inputs.get("batch_num_images")
        if sizes is None:
            return 0
        pictures = torch.as_tensor(sizes).tolist()
        alone = [True] * len(pictures)
        if counts is not None:
            alone = [count == 1 for count in torch.as_tensor(counts).tolist() for _ in range(count)]
        geometry = self.geometry()
        return sum(
            geometry.n_views(width, height) if single else 1
            for single, (height, width) in zip(alone, pictures, strict=True)
        )

    def scan_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give picture sizes and counts as numbers: how many tiles there are follows from them."""
        counts = inputs.get("batch_num_images")
        plain = super().scan_inputs(inputs)
        return plain if counts is None else {**plain, "batch_num_images": torch.as_tensor(counts).tolist()}

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `_random`
        """Return a tiny LLaVA-OneVision with random weights, and its processor."""
        return _random(seed, **structure)

    def _max_tiles(self) -> int:
        ours, theirs = self.config.vision_aspect_ratio, self.processor.vision_aspect_ratio
        if ours != theirs or not ours.startswith("anyres_max_"):
            raise LayoutError(
                f"the model's vision_aspect_ratio is {ours!r}, the processor's {theirs!r}; expected the same of both, "
                "such as 'anyres_max_9'."
            )
        return int(ours.removeprefix("anyres_max_"))


@lru_cache(maxsize=256)
def _alone(width: int, height: int, g: Anyres, max_tiles: int) -> ImageTokens:
    base = patches_of_view(base_boxes(width, height, g), 0)
    boxes, tile = tile_boxes(width, height, g)
    rows, columns = tile.shape
    # as transformers' `pack_image_features` has it
    ratio = math.sqrt(rows * columns / (max_tiles * g.grid**2))
    if ratio <= 1.1:
        return join_views(base, with_row_ends(boxes, tile))
    (top, bottom), (left, right) = _mixed(rows, int(rows // ratio)), _mixed(columns, int(columns // ratio))
    first, last = boxes[np.ix_(top, left)], boxes[np.ix_(bottom, right)]
    shrunk = np.concatenate([first[..., :2], last[..., 2:]], axis=-1)
    return join_views(base, replace(with_row_ends(shrunk, tile[np.ix_(top, left)]), inexact=SHRUNK))


def _mixed(count: int, fewer: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the first and last of the patches that bilinear interpolation mixes into each token, along one side."""
    place = np.maximum((np.arange(fewer) + 0.5) * (count / fewer) - 0.5, 0)
    first = np.floor(place).astype(np.int64)
    last = np.minimum(first + (place > first), count - 1)
    return first, last


def _beside_others(width: int, height: int, g: Anyres) -> ImageTokens:
    size = g.resize or g.base
    view = View(pad_to_square=True, size=size, crop=(g.view, g.view) if g.crop else None, patch=g.patch)
    patches = view.tokens(width, height)
    # a separator ends the picture
    end = with_row_ends(np.empty((1, 0, 4)), np.empty((1, 0), dtype=np.int64))
    return join_views(patches, end)


def _random(
    seed: int,
    side: int = 48,
    patch: int = 8,
    pinpoints: tuple[tuple[int, int], ...] = ((48, 96), (96, 48), (96, 96)),
    max_tiles: int = 9,
) -> tuple[Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessorPil,
        LlavaOnevisionProcessor,
        SiglipVisionConfig,
    )

    from sae_lens_multimodal.adapters.processors import without_video
    from sae_lens_multimodal.adapters.random_models import (
        CHAT_TEMPLATE,
        CONTROL,
        finished,
        tiny_llama,
        tiny_tower,
        word_tokenizer,
    )

    grids = [list(pinpoint) for pinpoint in pinpoints]
    control = (*CONTROL, "<video>")
    tokenizer = word_tokenizer(control, video_token="<video>")
    ratio = f"anyres_max_{max_tiles}"
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**tiny_tower(side, patch), vision_use_head=False),
        text_config=tiny_llama(tokenizer, kind="qwen2"),
        image_token_index=control.index("<image>"),
        video_token_index=control.index("<video>"),
        image_grid_pinpoints=grids,
        vision_aspect_ratio=ratio,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        architectures=["LlavaOnevisionForConditionalGeneration"],
    )
    processor = without_video(LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(size={"height": side, "width": side}, image_grid_pinpoints=grids),
        tokenizer,
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=ratio,
        chat_template=CHAT_TEMPLATE,
    )
    return finished(LlavaOnevisionForConditionalGeneration(config), tokenizer, seed), processor
