"""Regions, silent regions and drawings, on the real layout of the tiny model."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sae_lens_multimodal.autointerp.drawing import (
    colours,
    crop,
    dim,
    heat_overlay,
    mark,
    outline,
    show,
    shown_box,
)
from sae_lens_multimodal.autointerp.regions import (
    Region,
    connected_groups,
    find_regions,
    heat_of,
    moved_heat,
    silent_region,
)
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.features.example import Example
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.scenes import make_scene
from sae_lens_multimodal.types import Box
from tests.autointerp.sample import COLOURS, seen_colours

GREY = Image.new("RGB", (100, 80), (120, 120, 120))


def region(box: tuple[float, float, float, float], patch: float = 10.0) -> Region:
    return Region(image=0, box=Box(*box), tokens=(0,), view="base", patch_pixels=patch, peak=1.0)


def image_examples(store: FeatureStore) -> list[Example]:
    return [one for feature in range(len(COLOURS)) for one in store.examples(feature, "top", "image")]


def test_strongest_region_is_on_the_object(store: FeatureStore) -> None:
    for example in image_examples(store):
        found = find_regions(example)[0]
        scene = make_scene(example.prompt_id)
        (thing,) = [one for one in scene.objects if one.colour == COLOURS[example.feature]]
        x0, y0, x1, y1 = (round(value) for value in found.box)
        inside = thing.mask[y0:y1, x0:x1].sum() / thing.mask.sum()
        assert inside > 0.4, (example.prompt_id, found)
        assert found.view == "tiles"
        assert found.peak == pytest.approx(example.max_image)


def test_tokens_of_regions_are_those_above_the_threshold_each_once(store: FeatureStore) -> None:
    for example in image_examples(store):
        tokens = [token for one in find_regions(example, threshold=0.3) for token in one.tokens]
        values, tile = example.image_values, example.layout.tile[0].numpy()
        boxes = example.layout.boxes[0].numpy()
        has_area = np.nan_to_num((boxes[:, 2:] - boxes[:, :2]).min(axis=1)) > 0
        loud = np.flatnonzero((values >= 0.3 * values.max()) & (tile > 0) & has_area)
        assert sorted(tokens) == loud.tolist()


def test_region_is_exactly_the_union_of_its_patches(store: FeatureStore) -> None:
    for example in image_examples(store)[:8]:
        for found in find_regions(example, threshold=1.0):
            boxes = example.layout.boxes[0].numpy()[list(found.tokens)]
            assert found.box == (*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0))


def test_base_view_where_no_tile_fires(store: FeatureStore) -> None:
    example = image_examples(store)[0]
    values = np.zeros(len(example.tokens), dtype=np.float32)
    base = np.flatnonzero((example.layout.tile[0] == 0).numpy())
    values[base[7]] = 3.0
    other = _with(example, values)
    (found,) = find_regions(other)
    assert (found.view, found.tokens) == ("base", (int(base[7]),))
    assert found.box == tuple(example.layout.boxes[0, base[7]].tolist())
    assert find_regions(_with(example, np.zeros_like(values))) == []


def _with(example: Example, values: np.ndarray) -> Example:
    positions = np.flatnonzero(values)
    return Example(
        feature=example.feature,
        kind="top",
        modality="image",
        rank=0,
        quantile=None,
        max_image=float(values.max()),
        max_text=0.0,
        mean_image=float(values.mean()),
        mean_text=0.0,
        positions=positions,
        values=values[positions],
        prompt=example.prompt,
    )


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_threshold_is_a_share(store: FeatureStore, threshold: float) -> None:
    with pytest.raises(SelectionError, match="threshold"):
        find_regions(image_examples(store)[0], threshold=threshold)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), unique=True, min_size=1))
def test_groups_are_those_of_a_grid(cells: list[tuple[int, int]]) -> None:
    grid = np.zeros((6, 6), dtype=int)
    for row, column in cells:
        grid[row, column] = 1
    labels, count = _labelled(grid)
    step = 7.3
    boxes = np.array([[c * step, r * step, (c + 1) * step, (r + 1) * step] for r, c in cells], dtype=np.float32)
    groups = connected_groups(boxes)
    assert len(groups) == count
    for group in groups:
        assert len({labels[cells[index]] for index in group}) == 1


def _labelled(grid: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the four-connected groups of a grid by flooding, one cell at a time."""
    labels, count = np.zeros_like(grid), 0
    for start in zip(*np.nonzero(grid), strict=True):
        if labels[start]:
            continue
        count += 1
        open_cells = [start]
        while open_cells:
            row, column = open_cells.pop()
            inside = 0 <= row < grid.shape[0] and 0 <= column < grid.shape[1]
            if inside and grid[row, column] and not labels[row, column]:
                labels[row, column] = count
                open_cells += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return labels, count


def test_silent_region_has_the_size_and_none_of_the_feature(store: FeatureStore) -> None:
    found = 0
    for example in image_examples(store):
        right = find_regions(example)[0]
        wrong = silent_region(example, right, np.random.default_rng(0))
        if wrong is None:
            continue
        found += 1
        width, height = example.layout.image_sizes[0][0]
        assert wrong.box.width == pytest.approx(right.box.width)
        assert wrong.box.height == pytest.approx(right.box.height)
        assert wrong.box.x0 >= 0
        assert wrong.box.y0 >= 0
        assert wrong.box.x1 <= width
        assert wrong.box.y1 <= height
        style = RegionStyle()
        x0, y0, x1, y1 = shown_box(wrong, (width, height), style)
        for view in ("base", "tiles"):
            assert example.heatmap(0, view)[y0:y1, x0:x1].max() <= 0.05 * right.peak, (example.prompt_id, view)
        assert COLOURS[example.feature] not in seen_colours(crop(example.images[0], wrong, style), share=0.2)
    assert found >= 20


@pytest.mark.parametrize("view", ["base", "tiles"])
def test_silent_region_is_silent_in_the_other_view_too(store: FeatureStore, view: Literal["base", "tiles"]) -> None:
    found = 0
    for example in image_examples(store):
        boxes, tile = example.layout.boxes[0].numpy(), example.layout.tile[0].numpy()
        of_view, of_other = ((tile > 0), (tile == 0)) if view == "tiles" else ((tile == 0), (tile > 0))
        first = int(np.flatnonzero(of_view & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))[0])
        values = np.where(of_other & (boxes[:, 1] > 0.4 * example.images[0].height), 1.0, 0.0).astype(np.float32)
        values[first] = 1.0
        split = _with(example, values)
        right = Region(image=0, box=Box(*boxes[first].tolist()), tokens=(first,), view=view, patch_pixels=4.0, peak=1.0)
        wrong = silent_region(split, right, np.random.default_rng(0))
        if wrong is not None:
            found += 1
            x0, y0, x1, y1 = shown_box(wrong, example.images[0].size, RegionStyle())
            assert heat_of(split, 0)[y0:y1, x0:x1].max() == 0
    assert found >= 10


def test_patches_of_mere_padding_make_no_region_and_no_peak(store: FeatureStore) -> None:
    example = image_examples(store)[0]
    padding = int(np.flatnonzero((example.image_values == 0) & (example.layout.tile[0] > 0).numpy())[0])
    boxes = example.layout.boxes.clone()
    boxes[0, padding, 2] = boxes[0, padding, 0]
    padded = replace(example, prompt=replace(example.prompt, layout=replace(example.layout, boxes=boxes)))
    values = padded.image_values.copy()
    values[padding] = 100 * example.max_image
    assert find_regions(_with(padded, values)) == find_regions(example)
    assert find_regions(_with(padded, np.where(np.arange(len(values)) == padding, 1, 0).astype(np.float32))) == []


def test_silent_region_is_none_where_all_is_loud(store: FeatureStore) -> None:
    example = image_examples(store)[0]
    loud = _with(example, np.where(example.layout.is_image[0].numpy(), 1.0, 0.0).astype(np.float32))
    assert silent_region(loud, find_regions(image_examples(store)[0])[0], np.random.default_rng(0)) is None


def test_silent_region_depends_on_the_seed_alone(store: FeatureStore) -> None:
    example = image_examples(store)[2]
    right = find_regions(example)[0]
    first, second = (silent_region(example, right, np.random.default_rng(5)) for _ in range(2))
    assert first == second


def test_crop_shows_the_margin_and_no_more() -> None:
    one_patch = region((20, 30, 30, 40))
    assert crop(GREY, one_patch, RegionStyle(margin_pixels=0)).size == (10, 10)
    assert crop(GREY, one_patch, RegionStyle(margin_pixels=3)).size == (16, 16)
    assert crop(GREY, one_patch, RegionStyle()).size == (20, 20)
    assert shown_box(region((0, 70, 10, 80)), GREY.size, RegionStyle(margin_pixels=4)) == (0, 66, 14, 80)


def test_small_crop_is_enlarged_not_widened() -> None:
    picture = GREY.copy()
    picture.paste((255, 0, 0), (20, 30, 30, 40))
    cut = crop(picture, region((20, 30, 30, 40)), RegionStyle(margin_pixels=0, min_side_pixels=50))
    assert cut.size == (50, 50)
    assert cut.getcolors() == [(2500, (255, 0, 0))]


def test_region_outside_of_the_picture_is_refused() -> None:
    with pytest.raises(SelectionError, match="outside"):
        crop(GREY, region((200, 10, 210, 20)), RegionStyle())


def test_dimming_leaves_the_region_alone() -> None:
    dimmed = np.array(dim(GREY, region((20, 30, 30, 40)), RegionStyle(margin_pixels=0, dimmed_to=0.5)))
    assert (dimmed[30:40, 20:30] == 120).all()
    dimmed[30:40, 20:30] = 60
    assert (dimmed == 60).all()


def test_outline_lies_on_the_border_and_on_a_copy() -> None:
    drawn = np.asarray(outline(GREY, region((20, 30, 60, 70)), RegionStyle(margin_pixels=0)))
    changed = (drawn != 120).any(axis=-1)
    assert changed[30, 20:60].all()
    assert changed[69, 20:60].all()
    assert not changed[33:67, 23:57].any()
    assert not changed[:30].any()
    assert set(np.asarray(GREY).ravel()) == {120}


def test_views() -> None:
    one = region((20, 30, 30, 40))
    assert [view.size for view in show(GREY, one, RegionStyle(view="crop"))] == [(20, 20)]
    assert [view.size for view in show(GREY, one, RegionStyle(view="marked"))] == [GREY.size]
    both = show(GREY, one, RegionStyle(view="both"))
    assert [view.size for view in both] == [(20, 20), GREY.size]
    assert both[1].tobytes() == mark(GREY, one, RegionStyle()).tobytes()


def test_heat_view_needs_a_heat_map_and_shows_it() -> None:
    one, style = region((20, 30, 30, 40)), RegionStyle(view="heat")
    heat = np.zeros((80, 100), dtype=np.float32)
    heat[30:40, 20:30] = 2.0
    (shown,) = show(GREY, one, style, heat=heat)
    assert shown.tobytes() == heat_overlay(GREY, heat).tobytes()
    with pytest.raises(SelectionError, match="got no heat map"):
        show(GREY, one, style)


def test_heat_is_moved_as_it_is() -> None:
    heat = np.arange(48, dtype=np.float32).reshape(6, 8) + 1
    moved = moved_heat(heat, Box(1, 2, 4, 4), Box(5, 4, 8, 6))
    assert (moved[4:6, 5:8] == heat[2:4, 1:4]).all()
    assert np.count_nonzero(moved) == 6
    edge = moved_heat(heat, Box(1, 2, 3.6, 4), Box(5.6, 4, 8, 6))
    assert (edge[4:6, 6:8] == heat[2:4, 1:3]).all()


def test_heat_is_brightest_where_the_feature_is() -> None:
    heat = np.zeros((80, 100), dtype=np.float32)
    heat[10:20, 30:40] = 2.0
    pixels = np.asarray(heat_overlay(GREY, heat)).astype(int)
    assert pixels[15, 35].sum() > pixels[60, 60].sum()
    assert (np.asarray(heat_overlay(GREY, heat, peak=1e9)) == pixels[60, 60]).all()
    with pytest.raises(SelectionError, match="heat map is 100 x 80"):
        heat_overlay(GREY.resize((10, 10)), heat)


def test_colours_grow_brighter_steadily() -> None:
    weights = np.array([0.2126, 0.7152, 0.0722])
    luminance = colours(np.linspace(0, 1, 50)[None])[0] @ weights
    assert (np.diff(luminance) > 0).all()


@pytest.mark.parametrize(
    "options", [{"view": "all"}, {"margin_pixels": -1}, {"min_side_pixels": -1}, {"dimmed_to": 1.5}]
)
def test_style_is_checked(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        RegionStyle(**options)  # type: ignore[arg-type]
