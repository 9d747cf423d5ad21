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
    GROUND,
    colours,
    crop,
    dim,
    heat_overlay,
    mark,
    outline,
    show,
    shown_box,
    side_by_side,
)
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.regions import (
    Region,
    connected_groups,
    find_regions,
    heat_of,
    moved_heat,
    silent_region,
)
from sae_lens_multimodal.autointerp.styles import VIEWS, RegionStyle, View
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


def _views(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the patches of the base view and of the tiles."""
    boxes, tile = example.layout.boxes[0].numpy(), example.layout.tile[0].numpy()
    has_area = np.nan_to_num((boxes[:, 2:] - boxes[:, :2]).min(axis=1)) > 0
    return np.flatnonzero((tile == 0) & has_area), np.flatnonzero((tile > 0) & has_area)


def _tiles_in(example: Example, patch: int, wider: float) -> set[int]:
    """Patches of the tiles that lie, at least a little, in a patch of the base view that is wider by some pixels."""
    x0, y0, x1, y1 = example.layout.boxes[0, patch].tolist()
    box = Box(x0 - wider, y0 - wider, x1 + wider, y1 + wider)
    return set(example.layout.tokens_in(box, view="tiles", min_overlap=0.0).tolist())


def _rounding(example: Example, tokens: np.ndarray) -> float:
    boxes = example.layout.boxes[0].numpy()[tokens]
    return 0.05 * float((boxes[:, 2:] - boxes[:, :2]).min(initial=1e9))


def _under(example: Example, patch: int, tokens: np.ndarray | None = None) -> set[int]:
    """Patches of the tiles under a patch of the base view, beyond a twentieth of the smallest of some patches."""
    return _tiles_in(example, patch, -_rounding(example, _views(example)[1] if tokens is None else tokens))


def _near(example: Example, patch: int, tokens: np.ndarray | None = None) -> set[int]:
    """Patches of the tiles under a patch of the base view, or beside it."""
    return _tiles_in(example, patch, _rounding(example, _views(example)[1] if tokens is None else tokens))


def test_a_region_in_both_views_has_the_tiles_extent_and_the_stronger_views_peak(store: FeatureStore) -> None:
    for example in image_examples(store)[:8]:
        base, _ = _views(example)
        fine = sorted(_under(example, int(base[14])))[0]
        values = np.zeros(len(example.tokens), dtype=np.float32)
        values[fine], values[base[14]] = 2.0, 3.0
        (found,) = find_regions(_with(example, values))
        assert (found.view, found.tokens, found.peak) == ("tiles", (fine,), 3.0)
        assert found.box == tuple(example.layout.boxes[0, fine].tolist())


def test_what_fires_in_the_base_view_alone_is_not_lost(store: FeatureStore) -> None:
    for example in image_examples(store)[:8]:
        base, _ = _views(example)
        fine = sorted(_under(example, int(base[0])))[0]
        values = np.zeros(len(example.tokens), dtype=np.float32)
        values[fine], values[base[-1]], values[base[-2]] = 2.0, 3.0, 1.6
        first, second = find_regions(_with(example, values))
        assert (first.view, first.tokens, first.peak) == ("base", (int(base[-2]), int(base[-1])), 3.0)
        assert (second.view, second.tokens, second.peak) == ("tiles", (fine,), 2.0)


def test_the_blurred_edge_of_a_region_of_the_tiles_is_no_region(store: FeatureStore) -> None:
    tried = 0
    for example in image_examples(store):
        base, _ = _views(example)
        left, right = int(base[14]), int(base[15])
        bordering = _under(example, left) & _near(example, right) - _under(example, right)
        if not bordering:  # the grids of the two views do not meet there
            continue
        tried += 1
        touching = min(bordering)
        values = np.zeros(len(example.tokens), dtype=np.float32)
        values[[touching, left, right]] = 2.0, 2.0, 4.0
        (found,) = find_regions(_with(example, values))
        assert (found.tokens, found.peak) == ((touching,), 4.0)
        values[left] = 0.0
        assert len(find_regions(_with(example, values))) == 2, "the base view shows nothing of what the tile shows"
    assert tried >= 3


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), n_base=st.integers(0, 8), n_fine=st.integers(0, 8))
def test_every_firing_patch_is_in_a_region_or_shown_more_finely(
    store: FeatureStore, seed: int, n_base: int, n_fine: int
) -> None:
    rng = np.random.default_rng(seed)
    example = image_examples(store)[seed % 8]
    base, fine = _views(example)
    fires = [rng.choice(base, n_base, replace=False), rng.choice(fine, n_fine, replace=False)]
    values = np.zeros(len(example.tokens), dtype=np.float32)
    values[np.concatenate(fires)] = rng.uniform(1, 2, n_base + n_fine)
    found = find_regions(_with(example, values))
    of_tiles = [one for one in found if one.view == "tiles"]
    assert max((one.peak for one in found), default=0.0) == pytest.approx(values.max(initial=0.0))
    fine_alone = np.where(np.isin(np.arange(len(values)), fires[1]), values, np.float32(0))
    tiles_alone = find_regions(_with(example, fine_alone), threshold=0.1)
    assert {one.box for one in of_tiles} == {one.box for one in tiles_alone}, "none grows by a coarser patch"
    tokens = [token for one in found for token in one.tokens]
    assert len(set(tokens)) == len(tokens)
    every = np.concatenate(fires)
    shown = {patch: _under(example, patch, every) & set(fires[1].tolist()) for patch in fires[0].tolist()}
    for group in connected_groups(example.layout.boxes[0].numpy()[fires[0]]):
        patches = fires[0][group].tolist()
        for patch in patches:
            blurred = _near(example, patch, every) & set(fires[1].tolist()) and any(shown[one] for one in patches)
            assert patch in tokens or shown[patch] or blurred
            assert not (patch in tokens and shown[patch])


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
    sizes = {view: [image.size for image in _shown(one, view)] for view in VIEWS if view != "heat"}
    whole = GREY.size
    assert sizes == {
        "crop": [(20, 20)],
        "outlined": [whole],
        "dimmed": [whole],
        "marked": [whole],
        "both": [(20, 20), whole],
        "side_by_side": [(100 + 2 + 80, 80)],
    }
    style = RegionStyle()
    assert _shown(one, "both")[1].tobytes() == _shown(one, "marked")[0].tobytes() == mark(GREY, one, style).tobytes()
    assert _shown(one, "outlined")[0].tobytes() == outline(GREY, one, style).tobytes()
    assert _shown(one, "dimmed")[0].tobytes() == dim(GREY, one, style).tobytes()


def _shown(one: Region, view: View) -> list[Image.Image]:
    return show(GREY, one, RegionStyle(view=view))


def test_side_by_side_shows_picture_and_region_in_one_image() -> None:
    picture = GREY.copy()
    picture.paste((255, 0, 0), (20, 30, 40, 35))
    one = region((20, 30, 40, 35))
    style = RegionStyle(view="side_by_side", margin_pixels=0)
    shown = np.asarray(side_by_side(picture, one, style))
    assert shown.shape == (80, 100 + 2 + 100, 3)
    assert (shown[:, :100] == np.asarray(outline(picture, one, style))).all()
    cut = shown[:, 102:]
    red = (cut == (255, 0, 0)).all(axis=-1)
    rows = np.flatnonzero(red.any(axis=1))
    assert red[rows].all(), "as wide as the picture"
    assert (rows[0], rows[-1], len(rows)) == (27, 51, 25), "as high as its shape allows, in the middle"
    assert (cut[:27] == GROUND).all()
    (large,) = show(picture, one, replace(style, min_side_pixels=160))
    assert large.size == (404, 160)


def test_every_view_is_spelt_and_told_to_the_judge() -> None:
    books = [GeneralPrompts(fuzz_style=RegionStyle(view=view), explain_style=RegionStyle(view=view)) for view in VIEWS]
    assert len({book.version for book in books}) == len(VIEWS)
    told = [book.fuzz_image("red", [GREY]).text.split(" Description")[0] for book in books]
    assert all("(" in one for one in told)
    assert len(set(told)) == len(VIEWS)


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
