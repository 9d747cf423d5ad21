"""The LLaVA-NeXT family: its modules, and how any-resolution tiles become tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from sae_lens_multimodal.adapters.family import Family, ImageTokens, Released
from sae_lens_multimodal.adapters.grid import (
    boxes_of,
    grid_edges,
    height_width,
    join_views,
    patches_of_view,
    with_row_ends,
)
from sae_lens_multimodal.adapters.hook_points import HookPoint
from sae_lens_multimodal.adapters.modules import (
    LANGUAGE,
    OLD_PATHS,
    PROJECTOR,
    UNEMBEDDING,
    VISION,
    check_tower,
    clip_vision_hooks,
    complete_processor,
    embedding_hook,
    language_block,
    language_hooks,
    projector_hooks,
)
from sae_lens_multimodal.errors import LayoutError


class _Geometry(NamedTuple):
    """The numbers that decide where a token lies, from the model's and the processor's configuration."""

    pinpoints: tuple[tuple[int, int], ...]
    """Canvas sizes to choose from, (height, width)."""
    view: int
    """Side of the square that the vision tower sees."""
    cut: int
    """Side of the squares that the canvas is cut into."""
    base: tuple[int, int]
    """(height, width) to which the whole picture is squashed for the base view."""
    resize: tuple[int, int] | None
    """(height, width) to which every square is resized afterwards; None if it is not."""
    crop: bool
    """Whether every square is then cropped to `view` around its centre."""
    patch: int
    grid: int
    """Patches along one side."""


@final
class LlavaNext(Family):
    """LLaVA-NeXT: a base view of the whole picture, then its tiles row by row with a separator after each row."""

    model_type: ClassVar[str] = "llava_next"
    media_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    media_modules: ClassVar[tuple[str, ...]] = (VISION, PROJECTOR)
    old_paths: ClassVar[Mapping[str, str]] = OLD_PATHS
    final_norm: ClassVar[str] = f"{LANGUAGE}.norm"
    unembedding: ClassVar[str] = UNEMBEDDING
    released: ClassVar[tuple[Released, ...]] = (
        Released(
            (
                "llava-hf/llama3-llava-next-8b-hf",
                "llava-hf/llava-v1.6-vicuna-7b-hf",
                "llava-hf/llava-v1.6-vicuna-13b-hf",
                "llava-hf/llava-v1.6-34b-hf",
            ),
            RELEASED_VIEWS,
        ),
        Released(("llava-hf/llava-v1.6-mistral-7b-hf",), {**RELEASED_VIEWS, "text": "mistral"}),
        Released(("llava-hf/llava-next-72b-hf", "llava-hf/llava-next-110b-hf"), {**RELEASED_VIEWS, "text": "qwen2"}),
    )

    def __init__(self, config: Any, processor: Any) -> None:  # noqa: ANN401 - transformers' own
        """Read the configuration.

        Raises:
            UnsupportedModelError: the configuration is one that transformers itself cannot run.
        """
        super().__init__(config, processor)
        strategy = config.vision_feature_select_strategy
        check_tower(
            config.vision_config, 1 if strategy == "default" else 0, f"vision_feature_select_strategy={strategy!r}"
        )
        complete_processor(config, processor, strategy)

    def hook_points(self) -> Sequence[HookPoint]:
        """Return all named hooks in the order in which a forward pass reaches them."""
        text, vision = self.config.text_config, self.config.vision_config
        layers = self.config.vision_feature_layer
        seen = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
        return (
            *embedding_hook(text),
            *clip_vision_hooks(vision),
            *projector_hooks(seen, text.hidden_size, text.hidden_size),
            *language_hooks(text, language_block(text)),
        )

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Return how the placeholders of a picture of this size lie in it.

        Raises:
            LayoutError: processor and vision tower disagree about the size of a view.
        """
        # the processor's settings are the caller's to change, so they are read anew each time
        return _image_tokens(width, height, self._geometry())

    def merge_media(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Join pixel values, padding the number of tiles, and image sizes."""
        present = [batch for batch in batches if batch.get("pixel_values") is not None]
        if not present:
            return {}
        most = max(batch["pixel_values"].shape[1] for batch in present)
        padded = [
            torch.nn.functional.pad(pixels, (0, 0) * (pixels.dim() - 2) + (0, most - pixels.shape[1]))
            for pixels in (batch["pixel_values"] for batch in present)
        ]
        return {
            "pixel_values": torch.cat(padded),
            "image_sizes": torch.cat([torch.as_tensor(batch["image_sizes"]) for batch in present]),
        }

    def media_rows(self, inputs: Mapping[str, Any]) -> int:
        """Return the number of views of all pictures, padding left out."""
        sizes = inputs.get("image_sizes")
        if sizes is None:
            return 0
        geometry = self._geometry()
        return sum(
            1 + (best_h // geometry.cut) * (best_w // geometry.cut)
            for best_h, best_w in (
                select_best_resolution(size, list(geometry.pinpoints)) for size in torch.as_tensor(sizes).tolist()
            )
        )

    def scan_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give picture sizes as numbers: how many tiles there are follows from them."""
        sizes = inputs.get("image_sizes")
        return dict(inputs) if sizes is None else {**inputs, "image_sizes": torch.as_tensor(sizes).tolist()}

    @classmethod
    def random_model(cls, seed: int = 0, **structure: Any) -> tuple[Any, Any]:  # noqa: ANN401 - see `Released`
        """Return a tiny LLaVA-NeXT with random weights, and its processor."""
        from sae_lens_multimodal.adapters.random_models import random_llava_next

        return random_llava_next(seed, **structure)

    def _geometry(self) -> _Geometry:
        images, side = self.processor.image_processor, int(self.config.vision_config.image_size)
        base = height_width(images.size)
        cut = height_width(images.crop_size)[0] if images.crop_size else base[0]
        resize = base if images.do_resize else None
        seen = height_width(images.crop_size) if images.do_center_crop else (resize or (cut, cut))
        if seen != (side, side) or (resize is None and not images.do_center_crop and base != seen):
            raise LayoutError(
                f"the image processor makes views of {seen[0]} x {seen[1]} pixels, the vision tower expects "
                f"{side} x {side}; set the processor's size and crop_size to match."
            )
        pinpoints = tuple((int(height), int(width)) for height, width in images.image_grid_pinpoints)
        expected = tuple((int(height), int(width)) for height, width in self.config.image_grid_pinpoints)
        if pinpoints != expected or cut != side:
            raise LayoutError(
                f"the image processor cuts {list(pinpoints)} into tiles of {cut} pixels, the model expects "
                f"{list(expected)} and {side}; load them from one checkpoint."
            )
        patch = int(self.config.vision_config.patch_size)
        return _Geometry(pinpoints, side, cut, base, resize, bool(images.do_center_crop), patch, side // patch)


@lru_cache(maxsize=256)
def _image_tokens(width: int, height: int, geometry: _Geometry) -> ImageTokens:
    base = patches_of_view(_base_boxes(width, height, geometry), 0)
    return join_views(base, with_row_ends(*_tile_boxes(width, height, geometry)))


def _patch_edges(g: _Geometry, source: tuple[int, int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return [grid, 2] start and stop of the patches along y and x, in pixels of the square before resize and crop."""
    edges = grid_edges(g.grid, g.patch)
    sizes = g.resize or source
    result = []
    for size, original in zip(sizes, source, strict=True):
        offset = (size - g.view) // 2 if g.crop else 0
        result.append((edges + offset) * (original / size))
    return result[0], result[1]


def _base_boxes(width: int, height: int, g: _Geometry) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Boxes [grid², 4] of the base view, which squashes the whole picture into a square."""
    y, x = _patch_edges(g, g.base)
    y, x = y * (height / g.base[0]), x * (width / g.base[1])
    return boxes_of(y, x, width, height).reshape(-1, 4)


def _tile_boxes(
    width: int, height: int, g: _Geometry
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Boxes [rows, columns, 4] and tile numbers [rows, columns] of the patches left after unpadding."""
    canvas_h, canvas_w = select_best_resolution((height, width), list(g.pinpoints))
    tiles_y, tiles_x = canvas_h // g.cut, canvas_w // g.cut
    y, x = _patch_edges(g, (g.cut, g.cut))
    y = (y[None] + np.arange(tiles_y)[:, None, None] * g.cut).reshape(-1, 2)
    x = (x[None] + np.arange(tiles_x)[:, None, None] * g.cut).reshape(-1, 2)
    new_h, new_w = _fitted(width, height, canvas_w, canvas_h)
    y = (y - (canvas_h - new_h) // 2) * (height / new_h)
    x = (x - (canvas_w - new_w) // 2) * (width / new_w)
    boxes = boxes_of(y, x, width, height)
    number = 1 + (np.arange(len(y)) // g.grid)[:, None] * tiles_x + (np.arange(len(x)) // g.grid)[None, :]
    cut_y, cut_x = _unpadding(width, height, len(x), len(y))
    rows, columns = slice(cut_y, len(y) - cut_y), slice(cut_x, len(x) - cut_x)
    return boxes[rows, columns], number[rows, columns].astype(np.int64)


def _fitted(width: int, height: int, canvas_w: int, canvas_h: int) -> tuple[int, int]:
    """(height, width) of the picture on the canvas, as the image processor rounds it."""
    scale_w, scale_h = canvas_w / width, canvas_h / height
    if scale_w < scale_h:
        return min(int(np.ceil(height * scale_w)), canvas_h), canvas_w
    return canvas_h, min(int(np.ceil(width * scale_h)), canvas_w)


def _unpadding(width: int, height: int, columns: int, rows: int) -> tuple[int, int]:
    """Whole rows and columns of patches cut off at either side, as transformers' `unpad_image` rounds them."""
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2
