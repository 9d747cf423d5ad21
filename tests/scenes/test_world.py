"""The synthetic world: determinism, masks, boxes, attributes, rows."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from sae_lens_multimodal.scenes import (
    ATTRIBUTES,
    COLOURS,
    GLYPHS,
    SHAPES,
    TEXTURES,
    Scene,
    attribute_of,
    make_scene,
    scene_rows,
    scenes_dataset,
)
from sae_lens_multimodal.scenes import questions as q
from sae_lens_multimodal.scenes.crops import make_crop
from sae_lens_multimodal.scenes.words import HELD_OUT


def _same(one: Scene, other: Scene) -> bool:
    masks = all(np.array_equal(a.mask, b.mask) for a, b in zip(one.objects, other.objects, strict=True))
    return one == other and masks and np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_a_scene_follows_from_its_seed() -> None:
    assert _same(make_scene(11), make_scene(11))
    assert not np.array_equal(np.asarray(make_scene(11).image), np.asarray(make_scene(12).image))


@pytest.mark.parametrize("n_objects", [1, 2, 3, 4, 5])
def test_number_and_order_of_objects(n_objects: int) -> None:
    for seed in range(20):
        colours = [one.colour for one in make_scene(seed, n_objects=n_objects).objects]
        assert len(colours) == n_objects
        assert colours == sorted(set(colours), key=COLOURS.index)


def test_size_is_kept() -> None:
    scene = make_scene(3, size=(123, 77))
    assert scene.image.size == (123, 77)
    assert scene.objects[0].mask.shape == (77, 123)


@pytest.mark.parametrize(("arguments", "message"), [({"n_objects": 6}, "1 to 5"), ({"size": (20, 90)}, "32 pixels")])
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scene(0, **arguments)  # type: ignore[arg-type]


def test_boxes_are_tight_around_masks_and_masks_do_not_meet() -> None:
    for seed in range(30):
        scene = make_scene(seed)
        total = np.zeros((scene.image.height, scene.image.width), dtype=int)
        for one in scene.objects:
            x0, y0, x1, y1 = one.box
            inside = one.mask[y0:y1, x0:x1]
            assert inside.sum() == one.mask.sum() > 60
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            total += one.mask
        assert total.max() == 1


def test_masks_lie_on_the_objects_colour() -> None:
    """Solid objects without a glyph: pixels well inside the mask have the object's own colour, those outside do not."""
    found = 0
    for seed in range(60):
        scene = make_scene(seed)
        pixels = np.asarray(scene.image).astype(int)
        for one in scene.objects:
            if one.texture == "solid" and one.glyph is None:
                tone = np.median(pixels[one.mask], axis=0)
                near = np.abs(pixels - tone).max(axis=-1) < 12
                assert near[one.mask].mean() > 0.75
                assert near[~one.mask].mean() < 0.02
                found += 1
    assert found > 20


def test_every_grid_of_the_tiny_model_comes_up() -> None:
    from transformers.image_processing_utils import select_best_resolution

    from sae_lens_multimodal.scenes.tiny_config import GRIDS

    sizes = [make_scene(seed, n_objects=1).image.size for seed in range(80)]
    grids = {tuple(select_best_resolution((h, w), [list(grid) for grid in GRIDS])) for w, h in sizes}
    assert grids == set(GRIDS)
    assert 60 <= min(min(size) for size in sizes) <= max(max(size) for size in sizes) <= 210


def test_excluded_combinations_do_not_occur() -> None:
    combinations = {
        (one.colour, one.texture, one.shape)
        for seed in range(150)
        for one in make_scene(seed, exclude=HELD_OUT).objects
    }
    assert not combinations & HELD_OUT


@pytest.mark.parametrize("kind", sorted(ATTRIBUTES))
def test_every_value_is_found_by_its_word(kind: str) -> None:
    for value in ATTRIBUTES[kind]:
        assert attribute_of(value) == attribute_of(f" {value.upper()} ") == (kind, value)


def test_other_words_name_nothing() -> None:
    assert [attribute_of(word) for word in ("", "is", "circles", "letter")] == [None] * 4


def test_values_are_words_of_one_kind_only() -> None:
    words = [*COLOURS, *SHAPES, *TEXTURES, *GLYPHS]
    assert len(words) == len(set(words))


def test_phrases() -> None:
    one = make_scene(0).objects[0]
    assert one.phrase.split() == [one.colour, one.texture, one.shape]
    assert q.article_phrase({"shape": "star", "texture": "solid"}) == "a solid star"


def test_rows_follow_from_the_seed_and_have_one_schema() -> None:
    rows = list(scene_rows(5, 30))
    assert [row["kind"] for row in rows[:3]] == ["scene", "interleaved", "text"]
    for row, again in zip(rows, scene_rows(5, 31), strict=False):
        assert row["messages"] == again["messages"]
        assert row["scene_seeds"] == again["scene_seeds"]
        parts = [part for message in row["messages"] for part in message["content"]]
        assert all(set(part) == {"type", "text"} for part in parts)
        assert all((part["type"] == "image") == (part["text"] is None) for part in parts)
        assert sum(part["type"] == "image" for part in parts) == len(row["images"]) == len(row["scene_seeds"])
        assert row["messages"][-1]["role"] == "assistant"


def test_row_words_are_in_the_vocabulary() -> None:
    from sae_lens_multimodal.scenes.tiny_config import WORDS

    rows = scene_rows(9, 90)
    said = {
        word
        for row in rows
        for message in row["messages"]
        for part in message["content"]
        for word in (part["text"] or "").split()
    }
    assert said <= set(WORDS)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="movie"):
        next(scene_rows(0, 1, kinds=("movie",)))


def test_the_data_set_streams_the_same_rows() -> None:
    expected = list(scene_rows(2, 6))
    for row, wanted in zip(scenes_dataset(2, 6), expected, strict=True):
        assert row["messages"] == wanted["messages"]
        assert [image.size for image in row["images"]] == [image.size for image in wanted["images"]]
        for image, other in zip(row["images"], wanted["images"], strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(other))


@pytest.mark.parametrize("part", [False, True])
def test_crops_lie_in_the_picture_and_show_their_object(part: bool) -> None:
    rng = np.random.default_rng(0)
    for seed in range(40):
        scene = make_scene(seed)
        crop = make_crop(scene, 0, rng, part=part)
        x0, y0, x1, y1 = crop.box
        assert 0 <= x0 < x1 <= scene.image.width and 0 <= y0 < y1 <= scene.image.height
        assert crop.image.size == (x1 - x0, y1 - y0)
        seen = [one.mask[y0:y1, x0:x1].sum() for one in scene.objects]
        assert seen[0] == max(seen)
        assert ("shape" in crop.attributes) != part


def test_questions_are_answered_from_the_objects() -> None:
    red, blue = (
        {"colour": "red", "shape": "star", "texture": "solid"},
        {"colour": "blue", "shape": "star", "glyph": "x"},
    )
    objects = [red, blue]
    assert q.presence_question(objects, {"colour": "red", "shape": "star"})[:2] == ("is there a red star ?", "yes")
    assert q.presence_question(objects, {"colour": "red", "shape": "cross"}).answer == "no"
    assert q.presence_question(objects, {"texture": "striped"})[:2] == ("is there anything striped ?", "no")
    assert q.attribute_question(objects, {"colour": "blue"}, "glyph")[:2] == ("what letter is on the blue one ?", "x")
    with pytest.raises(ValueError, match="matches 2 objects"):
        q.attribute_question(objects, {"shape": "star"}, "colour")
    assert q.common_question(objects).answer == "star"
    assert q.judge_question(objects, {"shape": "star"})[:2] == ("do these all show a star ?", "yes")
    assert q.marked_sentence(red, ["colour"], "the") == "the [ red ] solid star ."


def test_importing_scenes_loads_no_torch() -> None:
    code = "import sys, sae_lens_multimodal.scenes as s; s.COLOURS; assert 'torch' not in sys.modules; print(dir(s))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "make_scene" in done.stdout
