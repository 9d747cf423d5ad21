"""Processors with and without a video part, and settings of theirs that win over those of their image part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from sae_lens_multimodal.adapters.llava_next_video import LlavaNextVideo
from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.adapters.processors import PictureProcessor, image_settings
from sae_lens_multimodal.adapters.registry import find_family
from sae_lens_multimodal.errors import ImageError, LayoutError
from tests.adapters.adapter_samples import picture, prompt
from tests.adapters.test_family_places import check_places


def with_settings(name: str, settings: dict[str, Any], **structure: Any) -> VisionLanguageModel:
    module, processor = find_family(name).random_model(0, **structure)
    processor.images_kwargs = {**getattr(processor, "images_kwargs", {}), **settings}
    return load_model(module, processor=processor)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "llava_next_video", "smolvlm"])
def test_a_folder_without_a_video_part_loads_where_torchvision_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, transformers' own choice misses the video part in what was saved here, and says so with this error."""
    module, processor = find_family(name).random_model()
    processor.save_pretrained(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(f"Can't load video processor for '{tmp_path}'. If you were trying to load it from ...")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    loader = find_family(name).processor_class(module.config)
    loaded = PictureProcessor(loader.pictures, whole=True).from_pretrained(str(tmp_path))
    batch = load_model(module, processor=loaded).encode(prompt(picture(60, 40), "what ?"))
    expected = load_model(module, processor=processor).encode(prompt(picture(60, 40), "what ?"))
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    # torchvision resizes to the same but for one step of 255, now and then
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=0.05, rtol=0)


def test_the_whole_processor_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name, **options: (name, options))
    loader = PictureProcessor(LlavaNextVideo, whole=True)
    assert loader.from_pretrained("a/b", revision="c") == ("a/b", {"revision": "c"})


def test_another_error_of_the_whole_processor_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("nobody/there is not a local folder")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(OSError, match="not a local folder"):
        PictureProcessor(LlavaNextVideo, whole=True).from_pretrained("nobody/there")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llava", {"do_pad": False}),
        ("vipllava", {"do_pad": False}),
        ("llava_next", {"size": {"shortest_edge": 24}}),
        ("llava_next_video", {"size": 36}),
        ("idefics3", {"do_image_splitting": False}),
        ("smolvlm", {"size": {"longest_edge": 40}}),
        ("internvl", {"crop_to_patches": False}),
        ("aya_vision", {"min_patches": 3}),
        ("mistral3", {"size": {"longest_edge": 32}}),
        ("qwen2_vl", {"size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}}),
        ("glm4v", {"size": {"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 32 * 32}}),
    ],
)
def test_boxes_follow_the_settings_of_the_processor(name: str, settings: dict[str, Any]) -> None:
    model = with_settings(name, settings)
    plain = with_settings(name, {})
    size = (100, 44)
    own, other = (one.encode(prompt(Image.new("RGB", size))).layout.boxes for one in (model, plain))
    assert not torch.equal(own.nan_to_num(-1), other.nan_to_num(-1)), "the setting changes nothing"
    check_places(model, size)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("llava", {"do_resize": False}, "views of many sizes"),
        ("llava", {"do_resize": False, "do_pad": False}, "views of many sizes"),
        ("gemma3", {"size": {"height": 24, "width": 24}}, "views of"),
        ("paligemma", {"size": {"height": 24, "width": 24}}, "views of"),
        ("llava_onevision", {"size": {"height": 96, "width": 96}}, "views of 96 x 96"),
        ("internvl", {"size": {"height": 20, "width": 20}}, "tiles of 20 x 20"),
        ("aya_vision", {"size": {"height": 20, "width": 20}}, "tiles of 20 x 20"),
        ("mistral3", {"do_resize": False}, "set its do_resize to True"),
        ("qwen2_vl", {"do_resize": False}, "100 x 44 pixels does not divide into blocks of 8.*do_resize"),
        ("glm46v", {"do_resize": False}, "100 x 44 pixels does not divide into blocks of 8.*do_resize"),
        ("siglip", {"do_center_crop": True}, "no crop_size"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_anything_breaks(
    name: str, settings: dict[str, Any], says: str
) -> None:
    tower: dict[str, Any] = {"tower": "siglip_vision_model", "images": "squash"} if name == "siglip" else {}
    model = with_settings("llava" if tower else name, settings, **tower)
    with pytest.raises(LayoutError, match=says):
        model.encode(prompt(picture(100, 44), "what ?"))


@pytest.mark.parametrize(("name", "size"), [("mistral3", (200, 3)), ("mistral3", (3, 200)), ("qwen3_vl", (3, 700))])
def test_pictures_that_are_too_thin_are_told_before_anything_breaks(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels"):
        with_settings(name, {}).encode(prompt(picture(*size), "what ?"))


def test_the_image_processor_itself_stays_as_it_is() -> None:
    model = with_settings("llava", {"do_pad": False, "size": 96})
    images = model.processor.image_processor
    before = images.to_dict()
    found = image_settings(model.processor)
    assert (found.do_pad, found.size.shortest_edge) == (False, 96)
    assert type(found) is type(images)
    assert images.to_dict() == before
