"""LLaVA-OneVision's boxes against transformers' own packing, shrinking included, and against its image processor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionModel,
    image_size_to_num_patches,
)

from sae_lens_multimodal.adapters.anyres import base_boxes, tile_boxes
from sae_lens_multimodal.adapters.encode import encode
from sae_lens_multimodal.adapters.family import ImageTokens
from sae_lens_multimodal.adapters.llava_next_video import LlavaNextVideo
from sae_lens_multimodal.adapters.llava_onevision import DEFAULT_PINPOINTS, LlavaOnevision
from sae_lens_multimodal.errors import LayoutError, PromptError
from sae_lens_multimodal.types import Modality
from tests.adapters.adapter_samples import picture, prompt
from tests.adapters.test_view_geometry import check_against_pixels, family_of, gradient

TINY_PINPOINTS = tuple((32 * rows, 32 * columns) for rows in range(1, 4) for columns in range(1, 4))
TINY = family_of(LlavaOnevision, side=32, patch=8, pinpoints=TINY_PINPOINTS, max_tiles=2)
RELEASED = family_of(LlavaOnevision, side=384, patch=14, pinpoints=DEFAULT_PINPOINTS, max_tiles=9)


def packed(family: LlavaOnevision, width: int, height: int, features: torch.Tensor) -> torch.Tensor:
    """Pass features of all patches, [views, patches, d], through transformers' packing; separators become NaN."""
    (tokens,), lengths = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=family.config),  # type: ignore[arg-type] # it reads nothing else of itself
        [features],
        torch.tensor([[height, width]]),
        image_newline=torch.full((features.shape[-1],), float("nan"), dtype=features.dtype),
        vision_aspect_ratio=family.config.vision_aspect_ratio,
    )
    assert lengths.tolist() == [len(tokens)]
    return tokens


def n_views(family: LlavaOnevision, width: int, height: int) -> int:
    pinpoints, side = family.config.image_grid_pinpoints, family.config.vision_config.image_size
    return int(image_size_to_num_patches((height, width), pinpoints, side))


def all_boxes(family: LlavaOnevision, width: int, height: int) -> torch.Tensor:
    """Boxes of all patches by view, before anything is cut off or shrunk: [views, patches, 4]."""
    g = family.geometry()
    canvas_h, canvas_w = g.canvas(width, height)
    # a picture that fills its canvas loses no patches: its boxes are scaled to this one's place on the canvas
    full = tile_boxes(canvas_w, canvas_h, g)[0].astype(np.float64)
    fitted_h, fitted_w = fitted(width, height, canvas_w, canvas_h)
    offset = np.array([(canvas_w - fitted_w) // 2, (canvas_h - fitted_h) // 2] * 2)
    scale = np.array([width / fitted_w, height / fitted_h] * 2)
    boxes = ((full - offset) * scale).clip(0, [width, height] * 2)
    rows, columns = boxes.shape[0] // g.grid, boxes.shape[1] // g.grid
    tiles = boxes.reshape(rows, g.grid, columns, g.grid, 4).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1, 4)
    return torch.from_numpy(np.concatenate([base_boxes(width, height, g)[None], tiles]))


def fitted(width: int, height: int, canvas_w: int, canvas_h: int) -> tuple[int, int]:
    from transformers.image_processing_utils import get_patch_output_size
    from transformers.image_utils import ChannelDimension

    shape = np.zeros((3, height, width), dtype=np.bool_)
    new_h, new_w = get_patch_output_size(shape, (canvas_h, canvas_w), ChannelDimension.FIRST)
    return int(new_h), int(new_w)


def check_kinds(tokens: ImageTokens, newline: np.ndarray[Any, Any]) -> None:
    assert len(tokens) == len(newline)
    assert ((tokens.modality == Modality.NEWLINE) == newline).all()
    assert np.isnan(tokens.boxes[newline]).all()
    assert (tokens.tile[newline] == -1).all()


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300))
@example(width=96, height=96)
@example(width=96, height=95)
@example(width=300, height=100)
def test_a_box_holds_the_patches_that_the_token_is_made_of(width: int, height: int) -> None:
    """Every patch has a direction of its own, so that each token shows which patches it is made of."""
    views, patches = n_views(TINY, width, height), 16
    count = views * patches
    made_of = packed(TINY, width, height, torch.eye(count, dtype=torch.float64).reshape(views, patches, count))
    newline = made_of[:, 0].isnan().numpy()
    tokens = TINY.image_tokens(width, height)
    check_kinds(tokens, newline)
    boxes = all_boxes(TINY, width, height).reshape(count, 4)
    shares = made_of[~torch.from_numpy(newline)]
    torch.testing.assert_close(shares.sum(-1), torch.ones(len(shares), dtype=torch.float64))
    used = shares > 1e-9
    assert bool(tokens.inexact) == bool((used.sum(-1) > 1).any()) or not used.any()
    infinite = torch.tensor(float("inf"), dtype=torch.float64)
    low = torch.where(used[..., None], boxes[None, :, :2], infinite).amin(1)
    high = torch.where(used[..., None], boxes[None, :, 2:], -infinite).amax(1)
    got = torch.from_numpy(tokens.boxes[~newline]).double()
    torch.testing.assert_close(got, torch.cat([low, high], dim=-1), atol=1e-3, rtol=1e-5)
    # the tile is one of those that its patches are of
    tile = torch.from_numpy(tokens.tile[~newline])
    assert used.reshape(len(used), views, patches).any(-1)[torch.arange(len(used)), tile].all()


@settings(max_examples=12, deadline=None)
@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
@example(width=2304, height=2304)
@example(width=1152, height=1152)
@example(width=1320, height=1320)
@example(width=1536, height=1152)
@example(width=4000, height=300)
def test_boxes_of_the_released_configuration(width: int, height: int) -> None:
    """Patches carry the middle of their boxes through packing and shrinking; each token's lies within its box."""
    boxes = all_boxes(RELEASED, width, height)
    middle = packed(RELEASED, width, height, (boxes[..., :2] + boxes[..., 2:]) / 2)
    newline = middle[:, 0].isnan().numpy()
    tokens = RELEASED.image_tokens(width, height)
    check_kinds(tokens, newline)
    got, seen = torch.from_numpy(tokens.boxes[~newline]).double(), middle[~torch.from_numpy(newline)]
    assert (got[:, :2] <= seen + 1e-2).all()
    assert (got[:, 2:] >= seen - 1e-2).all()
    exact = torch.from_numpy(tokens.tile[~newline] == 0) if tokens.inexact else torch.ones(len(got), dtype=torch.bool)
    torch.testing.assert_close(((got[:, :2] + got[:, 2:]) / 2)[exact], seen[exact], atol=1e-2, rtol=1e-5)


def test_large_pictures_are_marked_as_inexact() -> None:
    """Nine tiles are as many as are kept; 1.1² times as many patches are shrunk."""
    assert RELEASED.image_tokens(1152, 1152).inexact == ""
    large = RELEASED.image_tokens(2304, 2304)
    assert "bilinear" in large.inexact
    # 162 patches along a side become 81, and 729 patches are those of the base view
    assert int((large.tile > 0).sum()) == 81 * 81
    assert int((large.tile == 0).sum()) == 729
    layout = encode(TINY, [prompt(picture(96, 96), "what ?"), prompt(picture(9, 9), picture(96, 96))]).layout
    assert [[bool(note) for note in row] for row in layout.inexact] == [[True], [False, False]]
    assert layout.row(1).inexact == (("", ""),)


@pytest.mark.parametrize("size", [(200, 90), (70, 180), (64, 64)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_picture_beside_others_is_one_view(size: tuple[int, int]) -> None:
    one, other = TINY.row_tokens([size, (20, 30)])
    assert len(one) == len(other) == 4 * 4 + 1
    assert one.modality[-1] == Modality.NEWLINE
    images = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.0] * 3)
    plain = images([[gradient(*size), picture(20, 30)]], do_normalize=False, do_rescale=False, return_tensors="pt")
    patches = ImageTokens(one.modality[:-1], one.boxes[:-1], one.tile[:-1])
    check_against_pixels(patches, plain["pixel_values"][0], 8, size)


def test_model_and_processor_must_shrink_alike() -> None:
    family = family_of(LlavaOnevision)
    family.processor.vision_aspect_ratio = "anyres_max_4"
    with pytest.raises(LayoutError, match="'anyres_max_9', the processor's 'anyres_max_4'"):
        family.image_tokens(30, 30)


@pytest.mark.parametrize("kind", [LlavaOnevision, LlavaNextVideo])
def test_videos_are_refused(kind: Any) -> None:
    with pytest.raises(PromptError, match="'video'; expected 'text' or 'image'"):
        encode(family_of(kind), [{"role": "user", "content": [{"type": "video", "video": "film.mp4"}]}])
