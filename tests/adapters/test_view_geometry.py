"""Boxes of the families with one view for each picture against real image processors, and the models' own merging."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    LlavaImageProcessorPil,
    SiglipImageProcessorPil,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.mistral3.modeling_mistral3 import Mistral3PatchMerger
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from sae_lens_multimodal.adapters.encode import encode
from sae_lens_multimodal.adapters.family import Family, ImageTokens
from sae_lens_multimodal.adapters.gemma3 import Gemma3
from sae_lens_multimodal.adapters.grid import view_of
from sae_lens_multimodal.adapters.llava import Llava
from sae_lens_multimodal.adapters.mistral3 import Mistral3
from sae_lens_multimodal.adapters.paligemma import PaliGemma
from sae_lens_multimodal.errors import LayoutError, PromptError
from sae_lens_multimodal.types import Modality
from tests.adapters.adapter_samples import picture, prompt

SIDES = st.integers(8, 400)


def gradient(width: int, height: int) -> Image.Image:
    """A picture whose red grows with x and whose green grows with y; whose blue tells it from filling."""
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    pixels[..., 0] = np.round(255 * (np.arange(width) + 0.5) / width)
    pixels[..., 1] = np.round(255 * (np.arange(height)[:, None] + 0.5) / height)
    return Image.fromarray(pixels)


def centres_seen(views: torch.Tensor, patch: int, size: tuple[int, int]) -> tuple[np.ndarray[Any, Any], Any]:
    """Mean (x, y) in pixels of the original in each patch of each view, and which patches hold no filling."""
    side = views.shape[-1] // patch * patch
    patches = views[:, :, : views.shape[-2] // patch * patch, :side].double()
    patches = patches.unfold(2, patch, patch).unfold(3, patch, patch).flatten(-2)
    whole = (patches[:, 2] > 254).all(-1).flatten(1)
    centres = patches[:, :2].mean(-1).flatten(2).movedim(1, -1) / 255 * torch.tensor(size)
    return centres.numpy(), whole.numpy()


def check_against_pixels(tokens: ImageTokens, views: torch.Tensor, patch: int, size: tuple[int, int]) -> None:
    centres, whole = centres_seen(views, patch, size)
    boxes = tokens.boxes.astype(np.float64)
    assert len(boxes) == centres.shape[0] * centres.shape[1]
    for view in range(len(centres)):
        own = boxes[tokens.tile == view]
        middle = (own[:, :2] + own[:, 2:]) / 2
        # at the edge of the picture the resize filter, which reaches two pixels, sees less of one side
        inner = whole[view] & (own[:, :2] > 2).all(-1) & (own[:, 2:] < np.array(size) - 2).all(-1)
        # a step of colour is up to 1/255 of the picture
        limit = 0.05 * (own[:, 2:] - own[:, :2]) + np.array(size) / 255 + 0.5
        assert (np.abs(middle - centres[view])[inner] <= limit[inner]).all()
        empty = (own[:, 2:] <= own[:, :2]).any(-1)
        assert not (whole[view] & empty).any()


SQUARE = {"height": 336, "width": 336}
PROCESSORS = {
    "cropped": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=SQUARE),
    "cropped from more": CLIPImageProcessorPil(size={"shortest_edge": 400}, crop_size=SQUARE),
    "filled up": LlavaImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_pad=True),
    "filled up, by its edge": LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=SQUARE, do_pad=True),
    "squashed": SiglipImageProcessorPil(size=SQUARE),
    "cropped from less": CLIPImageProcessorPil(size={"height": 301, "width": 301}, crop_size=SQUARE),
}


@pytest.mark.parametrize("name", sorted(PROCESSORS))
@settings(max_examples=6, deadline=None)
@given(width=SIDES, height=SIDES)
@example(width=400, height=123)
@example(width=123, height=400)
@example(width=77, height=78)
@example(width=8, height=10)
def test_patches_of_a_view_show_what_their_boxes_say(name: str, width: int, height: int) -> None:
    images = PROCESSORS[name]
    plain = images(
        gradient(width, height), do_normalize=False, do_rescale=False, image_mean=[0.0, 0.0, 0.0], return_tensors="pt"
    )
    tokens = view_of(images, 336, 14).tokens(width, height)
    assert len(tokens) == 576
    check_against_pixels(tokens, plain["pixel_values"], 14, (width, height))


def test_the_released_llava_sees_the_middle_of_a_wide_picture_only() -> None:
    """336 of 672 pixels after resizing: a quarter of the width is lost on either side."""
    tokens = view_of(PROCESSORS["cropped"], 336, 14).tokens(640, 320)
    assert (tokens.boxes[:, 0].min(), tokens.boxes[:, 2].max()) == pytest.approx((160, 480))
    assert (tokens.boxes[:, 1].min(), tokens.boxes[:, 3].max()) == pytest.approx((0, 320))
    assert tokens.boxes[0] == pytest.approx((160, 0, 160 + 320 / 24, 320 / 24))


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}), "224, 224"),
        (CLIPImageProcessorPil(size={"shortest_edge": 336}, do_center_crop=False), "many sizes"),
        (SiglipImageProcessorPil(size=SQUARE, do_resize=False), "many sizes"),
        (SiglipImageProcessorPil(size=SQUARE, do_pad=True), "do_pad"),
    ],
)
def test_processors_that_do_not_fit(images: Any, says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        view_of(images, 336, 14)


def family_of(kind: type[Family], **structure: Any) -> Any:
    module, processor = kind.random_model(**structure)
    return kind(module.config, processor)


GEMMA = family_of(Gemma3)
GEMMA_RELEASED = family_of(Gemma3, side=896, patch=14, tokens=256)
GEMMA_PANNED = family_of(Gemma3, side=896, patch=14, tokens=256)
GEMMA_PANNED.processor.images_kwargs = {**GEMMA_PANNED.processor.images_kwargs, "do_pan_and_scan": True}


@settings(max_examples=10, deadline=None)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000), family=st.sampled_from([GEMMA, GEMMA_RELEASED]))
def test_pooled_tokens_hold_the_patches_that_gemma_averages(width: int, height: int, family: Gemma3) -> None:
    """Every patch carries its box through the model's own pooling: the mean of both ends is the middle of the union."""
    vision = family.config.vision_config
    grid = vision.image_size // vision.patch_size
    start = torch.arange(grid, dtype=torch.float64)
    y, x = (axis.reshape(-1) for axis in torch.meshgrid(start, start, indexing="ij"))
    unit = torch.tensor([width, height, width, height]) / grid
    carried = (torch.stack([x, y, x + 1, y + 1], dim=-1) * unit)[None]
    projector = Gemma3MultiModalProjector(family.config)
    spread = [
        projector.avg_pool(value.movedim(-1, 1).unflatten(-1, (grid, grid))).flatten(2).movedim(1, -1)[0]
        for value in (carried, carried**2)
    ]
    tokens = family.image_tokens(width, height)
    boxes = torch.from_numpy(tokens.boxes).double()
    assert len(boxes) == family.config.mm_tokens_per_image == family.processor.image_seq_length
    torch.testing.assert_close(
        (boxes[:, :2] + boxes[:, 2:]) / 2, (spread[0][:, :2] + spread[0][:, 2:]) / 2, rtol=1e-5, atol=1e-2
    )
    # how far the patches' left edges are apart tells how many there are along a side
    count = torch.sqrt(12 * (spread[1] - spread[0] ** 2).clamp(min=0) / unit**2 + 1)
    torch.testing.assert_close((boxes[:, 2:] - boxes[:, :2]) / unit[:2], count[:, :2], rtol=1e-2, atol=1e-2)


@settings(max_examples=8, deadline=None)
@given(width=st.integers(40, 1600), height=st.integers(40, 1600))
@example(width=1600, height=400)
@example(width=401, height=1599)
@example(width=1200, height=255)
@example(width=600, height=500)
@example(width=599, height=500)
def test_crops_of_pan_and_scan(width: int, height: int) -> None:
    images, settings_ = (
        Gemma3ImageProcessorPil(size={"height": 896, "width": 896}),
        GEMMA_PANNED.processor.images_kwargs,
    )
    made = images(gradient(width, height), do_normalize=False, do_rescale=False, return_tensors="pt", **settings_)
    tokens = GEMMA_PANNED.image_tokens(width, height)
    assert int(tokens.tile.max()) == int(made["num_crops"][0])
    check_against_pixels(tokens, made["pixel_values"], 56, (width, height))


def test_a_prompt_with_crops_is_laid_out() -> None:
    batch = encode(GEMMA_PANNED, [prompt("is", picture(1200, 300), "red ?"), prompt(picture(20, 30)), prompt("yes")])
    layout = batch.layout
    assert layout.tile.amax(1).tolist() == [4, 0, -1]
    assert int(layout.is_image.sum()) == (1 + 4 + 1) * 256 == 256 * len(batch["pixel_values"])
    assert torch.equal(batch["token_type_ids"] == 1, layout.is_image)
    marks = torch.isin(batch["input_ids"], torch.tensor(sorted(GEMMA_PANNED.markers())))
    assert int(marks.sum()) == 2 * 6
    assert (layout.image_index[marks] == 0).all()
    assert (layout.modality[marks] == Modality.SPECIAL).all()


MISTRAL = family_of(Mistral3)
MISTRAL_RELEASED = family_of(Mistral3, longest_edge=1540, patch=14, merged=2)


@settings(max_examples=12, deadline=None)
@given(width=st.integers(40, 2500), height=st.integers(40, 2500), family=st.sampled_from([MISTRAL, MISTRAL_RELEASED]))
@example(width=2, height=2000, family=MISTRAL_RELEASED)
@example(width=1540, height=1541, family=MISTRAL_RELEASED)
def test_merged_tokens_hold_the_patches_that_mistral_merges(width: int, height: int, family: Mistral3) -> None:
    """Patches carry their boxes through the model's own merger, which is made to average them."""
    vision, merged = family.config.vision_config, family.config.spatial_merge_size
    size = family.processor.image_processor.size
    images = PixtralImageProcessorPil(size=size, patch_size={"height": 1, "width": 1})
    made = images(Image.new("RGB", (width, height)), patch_size=vision.patch_size * merged, return_tensors="pt")
    new_h, new_w = made["image_sizes"][0].tolist()
    y, x = torch.meshgrid(
        torch.arange(new_h // vision.patch_size), torch.arange(new_w // vision.patch_size), indexing="ij"
    )
    unit = torch.tensor([width / new_w, height / new_h, width / new_w, height / new_h]) * vision.patch_size
    carried = torch.stack([x, y, x + 1, y + 1], dim=-1).reshape(-1, 4) * unit
    setting = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=4, patch_size=vision.patch_size), spatial_merge_size=merged
    )
    merger = Mistral3PatchMerger(setting)  # type: ignore[arg-type] # it reads nothing else of a configuration
    merger.merging_layer.weight.data = torch.eye(4).repeat_interleave(merged**2, dim=1) / merged**2
    with torch.no_grad():
        middle = merger(carried, torch.tensor([[new_h, new_w]]))
    boxes = torch.from_numpy(family.image_tokens(width, height).boxes)
    torch.testing.assert_close(
        (boxes[:, :2] + boxes[:, 2:]) / 2, (middle[:, :2] + middle[:, 2:]) / 2, rtol=1e-4, atol=1e-2
    )
    torch.testing.assert_close(
        boxes[:, 2:] - boxes[:, :2], (unit[:2] * merged).expand(len(boxes), 2), rtol=1e-3, atol=1e-2
    )


PALIGEMMA = family_of(PaliGemma)


@pytest.mark.parametrize("answers", [None, ["a square .", "no"]], ids=["asked", "answered"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_paligemma_makes_the_tokens_of_its_processor(answers: list[str] | None, side: Any) -> None:
    """For prompts that the processor takes: pictures in all, an answer in all or in none."""
    images, questions = [picture(30, 40), picture(50, 20)], ["what is this ?", "is there a red circle ?"]
    theirs = PALIGEMMA.processor(
        text=[f"<image>{question}" for question in questions],
        images=images,
        suffix=answers,
        padding=True,
        padding_side=side,
    )
    told = [
        prompt(image, question, answer=answer)
        for image, question, answer in zip(images, questions, answers or [None, None], strict=True)
    ]
    ours = encode(PALIGEMMA, told, padding_side=side)
    shown = theirs["attention_mask"]
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert np.array_equal(ours[name].numpy(), np.array(theirs[name])), name
    # it is the prefix that has 0, and what number a padded place has is of no account
    assert np.array_equal(ours["token_type_ids"].numpy() * shown, np.array(theirs["token_type_ids"]) * shown)
    assert ours["token_type_ids"].any() == (answers is not None)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "yes"}],
        [*prompt("what ?", answer="red"), *prompt("what ?")],
        [*prompt("what ?"), {"role": "assistant", "content": [{"type": "image", "image": picture(3, 3)}]}],
    ],
    ids=["answer alone", "two questions", "picture in answer"],
)
def test_conversations_that_paligemma_does_not_know(messages: Any) -> None:
    with pytest.raises(PromptError, match=r"PaliGemma|picture in an answer"):
        encode(PALIGEMMA, messages)


@pytest.mark.parametrize(
    ("name", "text", "images"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llama", "CLIPImageProcessor"),
        ("llava-hf/bakLlava-v1-hf", "mistral", "CLIPImageProcessor"),
        ("llava-hf/llava-interleave-qwen-0.5b-hf", "qwen2", "SiglipImageProcessor"),
        ("mistral-community/pixtral-12b", "mistral", "PixtralImageProcessor"),
    ],
)
def test_what_is_built_for_a_checkpoint_is_of_its_parts(name: str, text: str, images: str) -> None:
    """As their files on the hub say."""
    (released,) = (one for one in Llava.released if name in one.names)
    module, processor = Llava.random_model(0, **released.structure)
    assert module.config.text_config.model_type == text
    assert type(processor.image_processor).__name__.removesuffix("Pil") == images
    tokens = Llava.of(module, processor).image_tokens(600, 300)
    covered = [tokens.boxes[:, 0].min(), tokens.boxes[:, 2].max()]
    # cropped in the middle, or all of it but for less than a patch
    assert covered == [150, 450] if images.startswith("CLIP") else covered[0] == 0 and covered[1] > 580
