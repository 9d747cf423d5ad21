"""What Idefics3 and SmolVLM share: tiles row by row, then the whole picture, with patches merged by a pixel shuffle."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

from sae_lens_multimodal.adapters.family import Family, ImageTokens
from sae_lens_multimodal.adapters.hook_points import HookPoint, Part
from sae_lens_multimodal.adapters.modules import (
    UNEMBEDDING,
    clip_vision_hooks,
    embedding_hook,
    language_block,
    language_hooks,
)
from sae_lens_multimodal.adapters.processors import image_settings
from sae_lens_multimodal.adapters.random_models import (
    CHAT_TEMPLATE,
    CONTROL,
    finished,
    tiny_llama,
    tiny_tower,
    word_tokenizer,
)
from sae_lens_multimodal.adapters.scanning import features_for_pictures
from sae_lens_multimodal.adapters.tiles import Tile
from sae_lens_multimodal.errors import LayoutError
from sae_lens_multimodal.types import Modality

TEXT = "model.text_model"
TOWER = "model.vision_model"
CONNECTOR = "model.connector"
FILTER = 3
"""How many pixels a Lanczos filter reaches."""
BLURRED = (
    "the picture is so thin that the resize to its longest edge leaves few pixels across, which the resize to whole "
    "tiles then spreads: a token may see more beyond its box than the box is wide."
)
_TILE_MARKER = re.compile(r"<row_\d+_col_\d+>")


class IdeficsTiles(Family):
    """A picture is stretched to whole tiles, which are cut apart; the whole picture follows, squashed into one tile.

    Each token stands for a block of `scale_factor` x `scale_factor` patches. Line breaks that the processor writes
    between rows of tiles belong to the picture as NEWLINE, the tokens that name a tile's row and column as SPECIAL.
    Boxes are exact, but for very thin pictures, which two resizes blur: the layout's `inexact` then says so.
    """

    media_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_attention_mask")
    media_modules: ClassVar[tuple[str, ...]] = (TOWER, CONNECTOR)
    old_paths: ClassVar[Mapping[str, str]] = {}
    final_norm: ClassVar[str] = f"{TEXT}.norm"
    unembedding: ClassVar[str] = UNEMBEDDING

    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""
        text, vision = self.config.text_config, self.config.vision_config
        merged = vision.hidden_size * int(self.config.scale_factor) ** 2
        projector = (
            Part("hook_in", side="input", d=vision.hidden_size),
            Part("hook_merged", "modality_projection", side="input", d=merged),
            Part("hook_out", d=text.hidden_size),
        )
        return (
            *embedding_hook(text, TEXT),
            *clip_vision_hooks(vision, TOWER),
            *(part.at(prefix="projector.", path=CONNECTOR, tower="projector") for part in projector),
            *language_hooks(text, language_block(text), TEXT),
        )

    def markers(self) -> Mapping[int, Modality]:
        """Return the tokens before each tile, around a picture, and those that name rows and columns."""
        vocabulary = self.processor.tokenizer.get_added_vocab()
        named = {str(self.processor.fake_image_token), self._global_tag()}
        return {
            int(index): Modality.SPECIAL
            for token, index in vocabulary.items()
            if token in named or _TILE_MARKER.fullmatch(token)
        }

    def _global_tag(self) -> str:
        return str(self.processor.global_image_tag)

    def processor_images(self, images: Sequence[Sequence[Image.Image]]) -> Any:  # noqa: ANN401 - the processor's form
        """Return the pictures of each prompt as a list of their own."""
        return [list(row) for row in images] if any(images) else None

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the tokens of a picture of this size lie in it: tile by tile, then the whole picture.

        Raises:
            LayoutError: the processor's tiles do not make the number of tokens that it writes.
        """
        images, patch = image_settings(self.processor), int(self.config.vision_config.patch_size)
        merge, tile = int(self.config.scale_factor), int(images.max_image_size["longest_edge"])
        patches = tile // patch
        side = patches // merge
        if patches % merge or side**2 != int(self.processor.image_seq_len):
            raise LayoutError(
                f"tiles of {tile} pixels make {patches} x {patches} patches in blocks of {merge}, but the processor "
                f"writes {self.processor.image_seq_len} tokens for each; load model and processor from one checkpoint."
            )
        longest = int(images.size["longest_edge"]) if images.do_resize else None
        return _image_tokens(width, height, longest, bool(images.do_image_splitting), Tile(tile, side, patch * merge))

    def media_rows(self, inputs: Mapping[str, Any]) -> int:
        """Return the number of tiles of all pictures, without those that only fill up the batch."""
        pixels = inputs.get("pixel_values")
        # the model tells them by their pixels, all of which are 0
        return 0 if pixels is None else int((pixels != 0).flatten(2).any(-1).sum())

    def merge_media(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Join tiles, filling up the number of tiles as the processor does."""
        present = [batch for batch in batches if batch.get("pixel_values") is not None]
        most = max((batch["pixel_values"].shape[1] for batch in present), default=0)
        return {
            key: torch.cat([_filled(batch[key], most) for batch in present if batch.get(key) is not None])
            for key in self.media_keys
            if any(batch.get(key) is not None for batch in present)
        }

    def scan_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give features in place of pictures, for the model reads from their pixels how many tiles there are."""
        return dict(inputs) if inputs.get("pixel_values") is None else features_for_pictures(self, inputs)


def _filled(tiles: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(tiles, (0, 0) * (tiles.dim() - 2) + (0, count - tiles.shape[1]))


@lru_cache(maxsize=256)
def _image_tokens(width: int, height: int, longest: int | None, split: bool, tile: Tile) -> ImageTokens:
    first = (height, width)
    if longest is not None:
        # it looks at the shape alone
        first = get_resize_output_image_size(np.broadcast_to(np.uint8(0), first), resolution_max_side=longest)
    rows, columns = _tiles(first[1], first[0], tile.size) if split else (1, 1)
    found = tile.of_picture(width, height, rows, columns)
    lengths = zip((height, width), first, (rows, columns), strict=True)
    blurred = any(_blurred(before, after, count * tile.size, tile.block) for before, after, count in lengths)
    return replace(found, inexact=BLURRED if blurred else "")


def _blurred(original: int, first: int, last: int, block: int) -> bool:
    """Whether a second resize lets a token see further than one would, by more than the side of its box."""
    if first in (original, last):
        return False
    shrunk, once = min(1, first / original), min(1, last / original)
    # in pixels of the original, to either side
    twice = FILTER / shrunk + FILTER / min(1, last / first) * (original / first)
    return twice - FILTER / once > block * original / last


def _tiles(width: int, height: int, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles, as the image processor rounds them."""
    aspect = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        return math.ceil(int(columns * tile / aspect) / tile), columns
    rows = math.ceil(height / tile)
    return rows, math.ceil(int(rows * tile * aspect) / tile)


def tiny_idefics(
    model_class: Any,  # noqa: ANN401 - transformers' classes
    image_processor_class: Any,  # noqa: ANN401
    processor_class: Any,  # noqa: ANN401
    seed: int,
    *,
    tile: int = 40,
    longest_edge: int = 80,
    patch_size: int = 4,
    scale_factor: int = 2,
) -> tuple[Any, Any]:
    """Return a small model with random weights, and its processor.

    Args:
        model_class: the model's class.
        image_processor_class: the class of its image processor.
        processor_class: the class of its processor.
        seed: of the weights.
        tile: side of a tile in pixels.
        longest_edge: to what the longer side of a picture is resized.
        patch_size: side of a patch in pixels.
        scale_factor: patches along one side of the block that a token stands for.
    """
    around = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    names = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    tokenizer = word_tokenizer((*CONTROL, *around, *names))
    # released tokenizers have line breaks as ordinary tokens
    tokenizer.add_tokens(["\n"])
    side = tile // patch_size // scale_factor
    config = model_class.config_class(
        text_config=tiny_llama(tokenizer),
        vision_config=tiny_tower(tile, patch_size),
        scale_factor=scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        architectures=[model_class.__name__],
    )
    processor = processor_class(
        image_processor_class(size={"longest_edge": longest_edge}, max_image_size={"longest_edge": tile}),
        tokenizer,
        image_seq_len=side**2,
        chat_template=CHAT_TEMPLATE,
    )
    return finished(model_class(config), tokenizer, seed), processor
