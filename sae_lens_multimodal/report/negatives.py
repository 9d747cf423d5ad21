"""Hard negatives: regions that look like those where a feature is active, and on which it is silent."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_lens_multimodal.autointerp.negatives import HardNegatives
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.report.judged import region_picture
from sae_lens_multimodal.report.view import NegativeView

if TYPE_CHECKING:
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.assets import Assets
    from sae_lens_multimodal.report.runs import SortedRun
    from sae_lens_multimodal.types import Box

MAX_NEIGHBOURS = 2
"""Features of like direction that are looked at; each costs a look at all of its examples."""
FROM = {
    "same picture": "elsewhere in a picture where it is active",
    "neighbour": "where a feature of like direction is active",
    "similar": "in a picture where it is silent",
}
"""Where a hard negative that nobody was shown comes from."""


class _Place(NamedTuple):
    prompt_id: int
    image: int
    box: Box
    source: str


def negative_views(
    store: FeatureStore, feature: int, runs: Iterable[SortedRun], assets: Assets, count: int
) -> tuple[NegativeView, ...]:
    """Show hard negatives: those that explainers and judges were shown, then others of the same making.

    Args:
        store: the features and their examples.
        feature: which.
        runs: what explainers and judges were shown.
        assets: where pictures are written.
        count: how many at most; 0 for none.
    """
    if count < 1:
        return ()
    known = _once(place for run in runs for place in _recorded(run, feature))[:count]
    if len(known) < count:
        known = _once([*known, *_found(store, feature, count)])[:count]
    return tuple(
        NegativeView(
            picture=region_picture(
                store,
                assets,
                place.prompt_id,
                place.image,
                place.box,
                alt=f"Region of the picture of prompt {place.prompt_id} where the feature is silent, {place.source}",
            ),
            prompt=str(place.prompt_id),
            source=place.source,
        )
        for place in known
    )


def _recorded(run: SortedRun, feature: int) -> Iterator[_Place]:
    for explanation in run.explanations.get(feature, ()):
        pairs = ((explanation.shown, "shown to the explainer"), (explanation.validated_on, "its candidates tried on"))
        for shown, source in pairs:
            for one in shown:
                if not one.active and one.image is not None and one.box is not None:
                    yield _Place(one.prompt_id, one.image, one.box, source)
    for verdict in run.verdicts.get(feature, ()):
        if not verdict.truth and not verdict.control and verdict.image is not None and verdict.box is not None:
            taken = {True: "taken for it", False: "told from it", None: "unanswered"}[verdict.answer]
            yield _Place(verdict.prompt_id, verdict.image, verdict.box, f"{verdict.scorer}: {taken}")


def _once(places: Iterable[_Place]) -> list[_Place]:
    """Keep each region once, the first time that it comes."""
    found: dict[tuple[int, int, Box], _Place] = {}
    for place in places:
        found.setdefault((place.prompt_id, place.image, place.box), place)
    return list(found.values())


def _found(store: FeatureStore, feature: int, count: int) -> Sequence[_Place]:
    each = -(-count // 2)
    firing = store.examples(feature, "top", "image", limit=each)
    silent = store.examples(feature, "silent", "image", limit=each)
    rng = np.random.default_rng(zlib.crc32(f"report {feature}".encode()))
    described = store.description(feature)
    near = [] if described is None else [one.feature for one in described.neighbours][:MAX_NEIGHBOURS]
    finder = HardNegatives(store, neighbours={feature: near})
    places = finder.find(feature, firing, silent, count, style=RegionStyle(margin_pixels=0.0), rng=rng)
    return [
        _Place(example.prompt_id, region.image, region.box, FROM.get(source, source))
        for example, region, source in places
    ]
