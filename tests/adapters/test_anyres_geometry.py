"""LLaVA-NeXT's boxes against transformers' own packing, and against what its image processor does to real pixels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextImageProcessorPil
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from sae_lens_multimodal.adapters.encode import build_layout, encode
from sae_lens_multimodal.adapters.llava_next import LlavaNext
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.adapters.random_models import random_llava_next
from sae_lens_multimodal.errors import LayoutError, UnsupportedModelError
from sae_lens_multimodal.types import Modality
from tests.adapters.adapter_samples import picture, prompt

TINY = ([[48, 96], [96, 48], [96, 96]], 48, 8)
FULL = ([[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]], 336, 14)
UNEVEN = ([[60, 120], [120, 60]], 60, 8)
"""60 pixels are seven patches of eight and four pixels that no patch sees."""

HARD_SIZES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (2000, 1),
    (1, 2000),
    (3, 5),
    (336, 336),
    (337, 335),
    (672, 672),
    (640, 480),
    (480, 640),
    (1024, 331),
    (331, 1024),
    (4000, 500),
    (500, 4000),
    (999, 1000),
    (97, 41),
]


def family_for(setup: tuple[list[list[int]], int, int], **processor_options: Any) -> LlavaNext:
    """An adapter without a model: only the two configurations matter."""
    pinpoints, side, patch = setup
    _, processor = random_llava_next()
    options = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}} | processor_options
    processor.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **options)
    processor.patch_size = patch
    vision = CLIPVisionConfig(image_size=side, patch_size=patch)
    config = LlavaNextConfig(vision_config=vision, image_grid_pinpoints=pinpoints, image_token_index=6)
    return LlavaNext(config, processor)


def packed(family: LlavaNext, width: int, height: int) -> torch.Tensor:
    """Pass each patch's (view, y0, x0, y1, x1), in pixels of its view, through transformers' packing."""
    config = family.config
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    grid = side // patch
    canvas = select_best_resolution((height, width), config.image_grid_pinpoints)
    views = 1 + (canvas[0] // side) * (canvas[1] // side)
    start = torch.arange(grid, dtype=torch.float64) * patch
    y, x = (axis.reshape(-1) for axis in torch.meshgrid(start, start, indexing="ij"))
    features = torch.stack(
        [torch.stack([torch.full_like(y, view), y, x, y + patch, x + patch], dim=-1) for view in range(views)]
    )
    (tokens,), lengths = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),  # type: ignore[arg-type] # it reads nothing else of itself
        [features],
        torch.tensor([[height, width]]),
        vision_feature_select_strategy="default",
        image_newline=torch.full((5,), float("nan"), dtype=torch.float64),
    )
    assert lengths.tolist() == [len(tokens)]
    return tokens


def on_the_original(family: LlavaNext, tokens: torch.Tensor, width: int, height: int) -> np.ndarray[Any, Any]:
    """Boxes in the original for what `packed` gave, with transformers' own resizing and padding rules."""
    side = family.config.vision_config.image_size
    canvas = select_best_resolution((height, width), family.config.image_grid_pinpoints)
    shape = np.zeros((3, height, width), dtype=np.bool_)
    fitted = get_patch_output_size(shape, canvas, ChannelDimension.FIRST)
    (top, _), (left, _) = LlavaNextImageProcessorPil()._get_padding_size(fitted, canvas)
    columns = canvas[1] // side
    boxes = []
    for view, y0, x0, y1, x1 in tokens.tolist():
        if view == 0:
            scale_y, scale_x, shift_y, shift_x = height / side, width / side, 0.0, 0.0
        else:
            row, column = divmod(int(view) - 1, columns)
            scale_y, scale_x = height / fitted[0], width / fitted[1]
            shift_y, shift_x = row * side - top, column * side - left
        box = [(x0 + shift_x) * scale_x, (y0 + shift_y) * scale_y, (x1 + shift_x) * scale_x, (y1 + shift_y) * scale_y]
        boxes.append(np.clip(box, 0, [width, height, width, height]))
    return np.array(boxes)


def check_against_packing(family: LlavaNext, width: int, height: int) -> float:
    """Compare everything, and return the largest distance in pixels of the original."""
    tokens = packed(family, width, height)
    ours = family.image_tokens(width, height)
    newline = tokens[:, 0].isnan().numpy()
    assert len(ours) == len(tokens)
    assert ((ours.modality == Modality.NEWLINE) == newline).all()
    assert ((ours.modality == Modality.IMAGE) == ~newline).all()
    assert (ours.tile[newline] == -1).all()
    assert np.isnan(ours.boxes[newline]).all()
    assert (ours.tile[~newline] == tokens[~tokens[:, 0].isnan(), 0].numpy()).all()
    expected = on_the_original(family, tokens[~tokens[:, 0].isnan()], width, height)
    distance = float(np.abs(ours.boxes[~newline] - expected).max())
    assert distance < 1e-3 * max(1, max(width, height) / 100)
    return distance


@pytest.mark.parametrize("setup", [TINY, FULL, UNEVEN], ids=["tiny", "full", "uneven"])
@pytest.mark.parametrize("size", HARD_SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_boxes_agree_with_packing(setup: Any, size: tuple[int, int]) -> None:
    check_against_packing(family_for(setup), *size)


FAMILIES = {"tiny": family_for(TINY), "full": family_for(FULL)}


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), name=st.sampled_from(sorted(FAMILIES)))
@example(width=1, height=3000, name="full")
@example(width=1343, height=672, name="full")
@settings(max_examples=50, deadline=None)
def test_boxes_agree_with_packing_for_any_size(width: int, height: int, name: str) -> None:
    check_against_packing(FAMILIES[name], width, height)


@given(width=st.integers(1, 500), height=st.integers(1, 500))
@settings(max_examples=30, deadline=None)
def test_boxes_lie_in_the_picture_and_the_base_view_covers_it(width: int, height: int) -> None:
    tokens = FAMILIES["tiny"].image_tokens(width, height)
    boxes = tokens.boxes[tokens.modality == Modality.IMAGE].astype(np.float64)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [width + 1e-4, height + 1e-4]).all()
    assert (boxes[:, 2:] >= boxes[:, :2]).all()
    base = tokens.boxes[tokens.tile == 0].astype(np.float64)
    areas = (base[:, 2] - base[:, 0]) * (base[:, 3] - base[:, 1])
    assert areas.sum() == pytest.approx(width * height, rel=1e-5)


def gradient(width: int, height: int) -> Image.Image:
    """A picture whose red is x and whose green is y; whose blue tells it from padding."""
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None, :], np.arange(height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("setup", "options"),
    [
        (TINY, {}),
        (FULL, {}),
        (UNEVEN, {}),
        (TINY, {"size": {"shortest_edge": 64}}),
        (TINY, {"size": {"height": 48, "width": 48}, "do_center_crop": False}),
        (TINY, {"do_resize": False}),
    ],
    ids=["tiny", "full", "uneven", "resized-then-cropped", "no-crop", "no-resize"],
)
@pytest.mark.parametrize("size", [(200, 100), (90, 250), (131, 127)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_patches_show_what_their_boxes_say(setup: Any, options: dict[str, Any], size: tuple[int, int]) -> None:
    """Run transformers' image processor on a picture that carries its coordinates, and read them off each patch."""
    width, height = size
    family = family_for(setup, **options)
    images = family.processor.image_processor
    views = images(gradient(width, height), do_normalize=False, do_rescale=False, return_tensors="pt").pixel_values[0]
    grid, patch = setup[1] // setup[2], setup[2]
    views = views[:, :, : grid * patch, : grid * patch].double()
    patches = views.unfold(2, patch, patch).unfold(3, patch, patch).flatten(-2)
    inside = (patches[:, 2] > 250).all(-1)
    # a pixel's centre is half a pixel on from its coordinate
    centres = patches[:, :2].mean(-1).movedim(1, -1) + 0.5
    tokens = family.image_tokens(width, height)
    columns = select_best_resolution((height, width), setup[0])[1] // setup[1]
    checked = 0
    for index in np.flatnonzero(tokens.modality == Modality.IMAGE):
        box, view = tokens.boxes[index].astype(np.float64), int(tokens.tile[index])
        row, column = _place(family, tokens, index, view, grid, columns, size)
        if not inside[view, row, column]:
            continue
        seen = centres[view, row, column].numpy()
        np.testing.assert_allclose([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2], seen, atol=1.0)
        checked += 1
    assert checked > grid * grid / 2


def _place(
    family: LlavaNext, tokens: Any, index: int, view: int, grid: int, columns: int, size: tuple[int, int]
) -> tuple[int, int]:
    """Row and column of a token's patch within its view, from transformers' packing."""
    if view == 0:
        return divmod(int(index), grid)
    patch = family.config.vision_config.patch_size
    _, y0, x0, _, _ = packed(family, *size)[index].tolist()
    return int(y0 // patch), int(x0 // patch)


@pytest.mark.parametrize("setup", [TINY, FULL], ids=["tiny", "full"])
@pytest.mark.parametrize("size", HARD_SIZES[:9], ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_processor_writes_as_many_placeholders(setup: Any, size: tuple[int, int]) -> None:
    batch = encode(family_for(setup), prompt(picture(*size), "what is this ?"))
    found = int((batch["input_ids"] == 6).sum())
    assert found == int((batch.layout.image_index >= 0).sum())
    assert batch.layout.image_sizes == ((size,),)


def test_full_configuration_counts() -> None:
    """1 + 4 views of 24 x 24 patches: the numbers known from the papers."""
    tokens = FAMILIES["full"].image_tokens(672, 672)
    assert int((tokens.tile == 0).sum()) == 576
    assert int((tokens.tile > 0).sum()) == 4 * 576
    assert int((tokens.modality == Modality.NEWLINE).sum()) == 48


def test_changing_the_processor_changes_the_boxes() -> None:
    family = family_for(TINY)
    before = family.image_tokens(100, 50).boxes.copy()
    family.processor.image_processor.size = {"shortest_edge": 64}
    after = family.image_tokens(100, 50).boxes
    # 48 of 64 pixels around the centre are left
    assert before[0, 0] == 0
    assert after[0, 0] == pytest.approx(100 * 8 / 64)


def test_filling_around_a_small_tile_lies_in_no_other_tile() -> None:
    """Tiles resized to half of what is then cropped have filling around them, whose patches see no pixel."""
    family = family_for(TINY, size={"shortest_edge": 24})
    tokens = family.image_tokens(96, 96)
    boxes = tokens.boxes[tokens.tile == 2].astype(np.float64)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    assert len(areas) == 36
    # three by three patches in the middle hold the tile, at the picture's upper right
    assert (areas > 0).sum() == 16
    assert areas.sum() == pytest.approx(48 * 48)
    assert (boxes.min(0) == [48, 0, 48, 0]).all()
    assert (boxes.max(0) == [96, 48, 96, 48]).all()


def test_a_processor_that_does_not_fit_the_tower() -> None:
    with pytest.raises(LayoutError, match="56 x 56 pixels, the vision tower expects 48 x 48"):
        family_for(TINY, crop_size={"height": 56, "width": 56}).image_tokens(10, 10)
    family = family_for(TINY)
    family.processor.image_processor.image_grid_pinpoints = [[48, 48]]
    with pytest.raises(LayoutError, match="one checkpoint"):
        family.image_tokens(10, 10)


def test_configurations_that_transformers_cannot_run() -> None:
    config = family_for(TINY).config
    _, processor = random_llava_next()
    config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedModelError, match=r"'full'.*\+1 tokens"):
        LlavaNext(config, processor)


def test_processors_of_older_checkpoints_are_completed() -> None:
    config = family_for(TINY).config
    _, processor = random_llava_next()
    processor.patch_size = processor.vision_feature_select_strategy = None
    processor.num_additional_image_tokens = 0
    family = LlavaNext(config, processor)
    batch = encode(family, prompt(picture(20, 30)))
    assert int(batch.layout.is_image.sum()) == int((family.image_tokens(20, 30).modality == Modality.IMAGE).sum())


def test_a_row_whose_placeholders_do_not_match_its_pictures(llava: VisionLanguageModel) -> None:
    batch = llava.encode(prompt(picture(50, 50)))
    with pytest.raises(LayoutError, match="row 0 has"):
        build_layout(llava.family, batch["input_ids"], batch["attention_mask"], [[picture(90, 20)]])
