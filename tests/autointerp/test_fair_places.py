"""Silent regions that cannot be told by their place: a classifier that knows only where regions lie is at chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.places import (
    Spot,
    _gain,
    as_large_in,
    closed_assignment,
    exchanged,
    placed_alike,
    strongest_spots,
)
from sae_lens_multimodal.autointerp.regions import Region, patch_size, silent_region
from sae_lens_multimodal.autointerp.scorers import CropDetectionScorer, FuzzingScorer, Item, Sampling
from sae_lens_multimodal.autointerp.scorers.intruder import balanced_places
from sae_lens_multimodal.autointerp.selection import HeldOut
from sae_lens_multimodal.features.example import Example, StoredPrompt
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.scenes.render import COLOUR_RGB
from sae_lens_multimodal.scenes.world import make_scene
from tests.autointerp.sample import COLOURS, patch_activations, prompt_about

N_SCENES = 160
VIEWS: tuple[Literal["base", "tiles"], ...] = ("base", "tiles")


@pytest.fixture(scope="module")
def by_colour(model: VisionLanguageModel) -> dict[str, HeldOut]:
    """Examples of a feature for each colour of the scenes, on many scenes."""
    found = {colour: HeldOut(feature=0, modality="image", firing=[], silent=[]) for colour in COLOUR_RGB}
    for seed in range(1000, 1000 + N_SCENES):
        scene = make_scene(seed)
        batch = model.encode(prompt_about(scene.image, "what is in the picture ?"))
        tokens = model.token_strings(batch["input_ids"][0])
        prompt = StoredPrompt(seed, "[]", tokens, batch.layout.row(0), [str(seed)], lambda _, s=scene: s.image)
        boxes = batch.layout.boxes[0].numpy()
        for colour, held in found.items():
            example = example_of(prompt, patch_activations(scene, colour, boxes, strength=4.0))
            (held.firing if example.max_image > 0 else held.silent).append(example)
    return found


def example_of(prompt: StoredPrompt, values: np.ndarray) -> Example:
    positions = np.flatnonzero(values)
    return Example(
        feature=0,
        kind="top",
        modality="image",
        rank=0,
        quantile=None,
        max_image=float(values.max()),
        max_text=0.0,
        mean_image=0.0,
        mean_text=0.0,
        positions=positions,
        values=values[positions],
        prompt=prompt,
    )


def place_of(spot: Spot) -> list[float]:
    """Where a region lies in its picture: its centre, how far that is from the middle, and how near an edge is."""
    width, height = spot.example.layout.image_sizes[0][spot.region.image]
    box = spot.region.box
    x, y = (box.x0 + box.x1) / (2 * width), (box.y0 + box.y1) / (2 * height)
    edge = min(box.x0 / width, box.y0 / height, 1 - box.x1 / width, 1 - box.y1 / height)
    return [x, y, abs(x - 0.5), abs(y - 0.5), edge]


def told_by_place(spots: Sequence[Spot], truths: Sequence[bool]) -> float:
    """Area under the curve of a classifier of places on the very regions that it is fitted to: the most it can tell."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression())
    places = np.array([place_of(spot) for spot in spots])
    return float(roc_auc_score(truths, classifier.fit(places, truths).predict_proba(places)[:, 1]))


def spots_of(items: Sequence[Item], examples: HeldOut) -> list[Spot]:
    every = {one.prompt_id: one for one in [*examples.firing, *examples.silent]}
    found = []
    for item in items:
        assert item.box is not None
        assert item.image is not None
        region = Region(image=item.image, box=item.box, tokens=(), view="tiles", patch_pixels=1.0, peak=0.0)
        found.append(Spot(every[item.prompt_id], region))
    return found


def drawn(examples: HeldOut, rng: np.random.Generator) -> HeldOut:
    """Draw about as many examples as a store holds of a feature."""
    firing, silent = (
        [kind[index] for index in rng.permutation(len(kind))] for kind in (examples.firing, examples.silent)
    )
    return replace(examples, firing=firing[:24], silent=silent[:12])


def central(examples: HeldOut) -> HeldOut:
    """Keep firing examples in which the feature fires near the middle, as things in photographs mostly lie."""
    near = [one for one in strongest_spots(examples.firing) if max(abs(x - 0.5) for x in place_of(one)[:2]) < 0.3]
    return replace(examples, firing=[one.example for one in near])


@pytest.mark.parametrize("scorer", [FuzzingScorer(), CropDetectionScorer()])
@pytest.mark.parametrize("which", [replace, central])
def test_place_does_not_tell_right_from_wrong(
    by_colour: dict[str, HeldOut], scorer: FuzzingScorer, which: Callable[[HeldOut], HeldOut]
) -> None:
    spots: list[Spot] = []
    truths: list[bool] = []
    rng = np.random.default_rng(0)
    for _ in range(3):
        for examples in map(which, by_colour.values()):
            some = drawn(examples, rng)
            items = scorer.items(some, GeneralPrompts(), Sampling(n_positive=8, n_negative=8), rng)
            assert len(items) >= 12
            spots += spots_of(items, examples)
            truths += [item.truth for item in items]
    assert sum(truths) * 2 == len(truths)
    assert told_by_place(spots, truths) < 0.55


@pytest.mark.parametrize(("which", "least"), [(replace, 0.56), (central, 0.7)])
def test_silent_regions_chosen_freely_are_told_by_their_place(
    by_colour: dict[str, HeldOut], which: Callable[[HeldOut], HeldOut], least: float
) -> None:
    rng = np.random.default_rng(0)
    spots: list[Spot] = []
    for examples in map(which, by_colour.values()):
        for right in strongest_spots(examples.firing):
            wrong = silent_region(right.example, right.region, rng)
            if wrong is not None:
                spots += [right, Spot(right.example, wrong)]
    assert told_by_place(spots, [True, False] * (len(spots) // 2)) > least


def colour_spots(store: FeatureStore, feature: int) -> list[Spot]:
    return list(strongest_spots(store.examples(feature, "top", "image")))


def same_places(spots: Sequence[Spot], others: Sequence[Spot]) -> bool:
    """Tell whether each lies, up to a patch, at the place of one of the others, and each of those is needed once."""

    def patches_away(one: Spot, other: Spot) -> float:
        picture = np.array(one.example.images[one.region.image].size)
        room = picture - (one.region.box.width, one.region.box.height)
        return float(np.abs((one.place - other.place) * room).max() / one.region.patch_pixels)

    apart = np.array([[patches_away(one, other) > 1 for other in others] for one in spots]).reshape(
        len(spots), len(others)
    )
    return not apart[linear_sum_assignment(apart)].any()


@pytest.mark.parametrize("margin", [0, 6])
def test_exchanged_regions_are_silent_as_large_and_at_the_places_of_the_others(
    store: FeatureStore, margin: int
) -> None:
    found = 0
    for feature in range(len(COLOURS)):
        spots = colour_spots(store, feature)
        pairs = exchanged(spots, len(spots), margin_pixels=margin)
        found += len(pairs)
        assert same_places([Spot(spot.example, region) for spot, region in pairs], [spot for spot, _ in pairs])
        for own, region in pairs:
            assert Spot(own.example, region).size == pytest.approx(own.size)
            assert region.tokens
            x0, y0, x1, y1 = (round(value) for value in region.box)
            for view in VIEWS:
                heat = own.example.heatmap(0, view)[
                    max(0, y0 - margin) : y1 + margin, max(0, x0 - margin) : x1 + margin
                ]
                assert heat.max() <= 0.05 * own.region.peak
    assert found >= 12


def test_as_many_pairs_as_wanted_of_the_first_that_fit(by_colour: dict[str, HeldOut]) -> None:
    spots = list(strongest_spots(by_colour["red"].firing))
    for count in range(2, 8):
        pairs = exchanged(spots, count)
        assert count - (count % 2) <= len(pairs) <= count, "two always exchange places; three cannot always"
        assert same_places([Spot(spot.example, region) for spot, region in pairs], [spot for spot, _ in pairs])
    assert exchanged(spots, 1) == [], "one place alone cannot be exchanged"
    assert exchanged([], 3) == []
    loud = [example_of(spot.example.prompt, _everywhere(spot.example)) for spot in spots[:2]]
    found = exchanged([*strongest_spots(loud), *spots[2:]], 5)
    assert len(found) == 5
    assert not {one.prompt_id for one in loud} & {spot.example.prompt_id for spot, _ in found}


def test_who_always_fires_at_one_place_gets_no_silent_region_there(store: FeatureStore) -> None:
    spots = colour_spots(store, 0)
    corner = [_firing_in_the_corner(spot.example) for spot in spots]
    assert exchanged(list(strongest_spots(corner)), len(corner)) == []


def _firing_in_the_corner(example: Example) -> Example:
    values = np.zeros(len(example.tokens), dtype=np.float32)
    boxes = example.layout.boxes[0].numpy()
    values[(boxes[:, 0] == 0) & (boxes[:, 1] == 0)] = 1.0
    return example_of(example.prompt, values)


def _everywhere(example: Example) -> np.ndarray:
    return np.where(example.layout.is_image[0].numpy(), 1.0, 0.0).astype(np.float32)


def test_silent_pictures_give_regions_as_large_at_the_same_places(store: FeatureStore) -> None:
    spots, silent = colour_spots(store, 2), store.examples(2, "silent", "image")
    found = placed_alike(spots, silent[:6], rng=np.random.default_rng(0))
    assert [one is not None for one in found] == [True] * 6 + [False] * (len(spots) - 6)
    assert len({one.example.prompt_id for one in found if one}) == 6
    for spot, one in zip(spots, found, strict=True):
        if one is not None:
            assert one.example.kind == "silent"
            assert same_places([one], [spot])
            patch = patch_size(one.example, 0, spot.region.view)
            assert patch is not None
            scale = (one.picture.prod() / spot.picture.prod()) ** 0.5
            wanted = np.minimum(scale * spot.size * spot.picture, one.picture)
            assert (np.abs(one.size * one.picture - wanted) <= patch).all(), "of the same shape, as large a part"
    assert placed_alike(spots, [], rng=np.random.default_rng(0)) == [None] * len(spots)
    assert placed_alike([], silent, rng=np.random.default_rng(0)) == []


def test_none_is_left_out_for_more_detail_elsewhere() -> None:
    gain = _gain(np.array([[100.0, 1.0], [90.0, -1.0]]), np.array([[True, True], [True, False]]), -1.0)
    _, columns = linear_sum_assignment(gain, maximize=True)
    assert columns.tolist() == [1, 0], "both, rather than the better one alone"


def test_a_view_that_a_picture_lacks_gives_no_region(store: FeatureStore) -> None:
    (spot, *_), example = colour_spots(store, 0), store.examples(0, "silent", "image")[0]
    layout = replace(example.layout, tile=example.layout.tile.clamp(max=0))
    flat = replace(example, prompt=replace(example.prompt, layout=layout))
    assert spot.region.view == "tiles"
    assert as_large_in(example, 0, spot) is not None
    assert as_large_in(flat, 0, spot) is None


def best_by_trying(worth: np.ndarray, possible: np.ndarray) -> tuple[int, float]:
    """Try every permutation: the most assignments, and the most worth with so many."""
    n = len(worth)
    found = []
    for order in permutations(range(n)):
        used = [(row, column) for row, column in enumerate(order) if row != column]
        if all(possible[pair] for pair in used):
            found.append((len(used), sum(worth[pair] for pair in used)))
    return max(found)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5).flatmap(lambda n: st.tuples(*[arrays.arrays(int, (n, n), elements=st.integers(0, 3))] * 2)))
def test_as_many_as_can_be_are_assigned_and_then_as_well_as_can_be(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    worth, dice = drawn
    possible = (dice > 1) & ~np.eye(len(dice), dtype=bool)
    columns = closed_assignment(worth.astype(float), possible)
    used = [(row, column) for row, column in enumerate(columns) if column is not None]
    assert all(possible[pair] for pair in used)
    assert {row for row, _ in used} == {column for _, column in used}
    assert len({column for _, column in used}) == len(used)
    assert (len(used), sum(worth[pair] for pair in used)) == best_by_trying(worth, possible)


def test_every_place_comes_as_often_as_any_other() -> None:
    firsts = []
    for seed in range(40):
        places = balanced_places(8, 4, np.random.default_rng(seed))
        assert sorted(places) == [0, 0, 1, 1, 2, 2, 3, 3]
        firsts.append(places[0])
    assert set(firsts) == {0, 1, 2, 3}
    assert len(balanced_places(5, 4, np.random.default_rng(0))) == 5
    assert balanced_places(0, 4, np.random.default_rng(0)) == []
