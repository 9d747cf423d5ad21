"""Pictures that look alike count as one, through the whole pass; those that do not stay apart."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sae_lens import SAE

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.selection import check_disjoint, distinct, held_out
from sae_lens_multimodal.data.stream import open_dataset, read_prompts
from sae_lens_multimodal.errors import SelectionError
from sae_lens_multimodal.features.harvest import harvest
from sae_lens_multimodal.features.hashing import image_id
from sae_lens_multimodal.features.near import NearPictures, picture_hash
from sae_lens_multimodal.scenes import make_scene, scene_rows


def photograph(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Smooth random colours, as photographs from afar."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def recompressed(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "recompressed": lambda picture: recompressed(picture, 60),
    "smaller": lambda picture: picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BICUBIC),
    "larger": lambda picture: picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.BICUBIC),
    "brighter": lambda picture: picture.point(lambda value: min(255, value + 8)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found(name: str) -> None:
    near = NearPictures()
    for seed in range(20):
        picture = photograph(seed)
        assert near.first_like(image_id(picture), picture) == image_id(picture)
        copy = COPIES[name](picture)
        assert image_id(copy) != image_id(picture)
        assert near.first_like(image_id(copy), copy) == image_id(picture)
    assert near.count == 20


def test_other_pictures_stay_apart() -> None:
    near = NearPictures()
    flat = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "black", "white")]
    scenes = [make_scene(seed).image for seed in range(150)]
    for picture in (*flat, *scenes):
        assert near.first_like(image_id(picture), picture) == image_id(picture)
    left, right = Image.new("RGB", (64, 64), "grey"), Image.new("RGB", (64, 64), "grey")
    left.paste("red", (10, 10, 34, 34))
    right.paste((54, 54, 255), (10, 10, 34, 34))
    words = np.bitwise_count(picture_hash(left).words ^ picture_hash(right).words)
    assert words.sum() > near.max_bits, "another colour of the same brightness is another picture"


def test_the_oldest_is_the_first_and_is_forgotten_first() -> None:
    near = NearPictures(remembered=3)
    pictures = [photograph(seed) for seed in range(5)]
    names = [image_id(picture) for picture in pictures]
    for name, picture in zip(names, pictures, strict=True):
        assert near.first_like(name, picture) == name
    for index in (2, 3, 4):
        copy = COPIES["smaller"](pictures[index])
        assert near.first_like(image_id(copy), copy) == names[index]
    again = COPIES["smaller"](pictures[0])
    assert near.first_like(image_id(again), again) == image_id(again), "forgotten: two others came after three"
    other = NearPictures(remembered=3)
    other.restore(near.tensors())
    for picture in pictures:
        assert other.first_like(image_id(picture), picture) == near.first_like(image_id(picture), picture)
    assert other.count == near.count


def test_equal_pictures_only() -> None:
    near, picture = NearPictures(-1), photograph(0)
    copy = COPIES["smaller"](picture)
    assert near.first_like(image_id(picture), picture) == image_id(picture)
    assert near.first_like(image_id(copy), copy) == image_id(copy)


@pytest.fixture(scope="module")
def doubled() -> list[dict[str, Any]]:
    """Scenes, each of which comes once more in a larger picture."""
    rows = []
    for row, prompt in zip(scene_rows(4, 8, kinds=("scene",)), read_prompts(open_dataset(_rows())), strict=True):
        rows.append({**row, "images": prompt.images})
        larger = [
            image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC) for image in prompt.images
        ]
        rows.append({**row, "images": larger})
    return rows


def _rows() -> list[dict[str, Any]]:
    return list(scene_rows(4, 8, kinds=("scene",)))


def test_a_harvest_takes_near_duplicates_for_one(
    model: VisionLanguageModel, sae: SAE[Any], doubled: list[dict[str, Any]], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"n_top": 8, "n_ordinary": 4, "n_silent": 4, "batch_size": 4, "progress": False}
    store = harvest(model, sae, doubled, tmp_path / "near", **settings)
    plain = harvest(model, sae, doubled, tmp_path / "plain", near_bits=None, **settings)
    assert store.settings["n_pictures"] == {"seen": 16, "distinct": 8, "near_duplicates": 8}
    assert plain.settings["n_pictures"]["near_duplicates"] == 0
    more = 0
    for feature in store.features:
        examples = [*store.examples(feature, "top", "image"), *store.examples(feature, "ordinary", "image")]
        scenes = [example.prompt_id // 2 for example in examples]
        assert len(set(scenes)) == len(scenes), "a picture and its enlargement are one"
        assert all(set(example.prompt.near_ids) <= example.pictures for example in examples)
        more += len(plain.examples(feature, "top", "image")) > len(store.examples(feature, "top", "image"))
    assert more > 10


def test_no_near_duplicate_is_scored_that_was_shown(
    model: VisionLanguageModel, sae: SAE[Any], doubled: list[dict[str, Any]], tmp_path: Path
) -> None:
    # Lists hold a scene once, but the image list and the text list of a feature each have their own pick of the two.
    store = harvest(model, sae, doubled, tmp_path / "near", n_top=8, n_ordinary=4, batch_size=4, progress=False)
    checked = 0
    for feature in store.features:
        by_image = {example.prompt_id: example for example in store.examples(feature, "top", "image")}
        for other in store.examples(feature, "top", "text"):
            twin = by_image.get(other.prompt_id ^ 1)
            if twin is None:
                continue
            assert set(other.image_ids).isdisjoint(twin.image_ids), "their pixels differ"
            assert distinct([twin, other], prompts=set(), images=set()) == [twin]
            with pytest.raises(SelectionError, match="the explainer saw"):
                check_disjoint([other], prompts=[], images=store.look_alikes(twin.image_ids))
            rng = np.random.default_rng(0)
            left = held_out(store, feature, "text", prompts=[twin.prompt_id], images=twin.image_ids, rng=rng)
            assert other.prompt_id not in [one.prompt_id for one in (*left.firing, *left.silent)]
            checked += 1
    assert checked > 3
    assert store.look_alikes(["nobody"]) == {"nobody"}
