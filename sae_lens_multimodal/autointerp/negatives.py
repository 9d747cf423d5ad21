"""Hard negatives: regions that look like those where a feature fires, and on which it is known to be silent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from sae_lens_multimodal.autointerp.places import Spot, as_large_in, exchanged, strongest_spots
from sae_lens_multimodal.autointerp.regions import Region, crop, find_regions, silent_region
from sae_lens_multimodal.errors import FeatureError
from sae_lens_multimodal.features.neighbours import nearest_directions

if TYPE_CHECKING:
    from sae_lens import SAE

    from sae_lens_multimodal.autointerp.styles import RegionStyle
    from sae_lens_multimodal.features.embedding import Embed
    from sae_lens_multimodal.features.example import Example
    from sae_lens_multimodal.features.store import FeatureStore

TRIED_REGIONS = 4
"""So many regions of a silent picture are compared with those where the feature fires."""


class Place(NamedTuple):
    """A region of one prompt's picture."""

    example: Example
    region: Region
    source: str
    """Of which kind it is: same picture, neighbour or similar."""


class HardNegatives:
    """Finds regions on which a feature is silent, the confusing ones first.

    - `same picture`: another region of a picture in which it fires, as large, with much detail.
    - `neighbour`: where a feature of nearly the same decoder direction fires.
    - `similar`: of pictures in which it is silent, the regions that look most like those where it fires.

    Args:
        store: the features and their examples.
        threshold: share of an example's strongest activation from which on a patch belongs to a region.
        neighbours: of each feature the features with the nearest decoder directions, nearest first, as
            `decoder_neighbours` gives them; None for those of the store, if its features were described.
        embed: what makes pictures comparable. None: the model's own vision tower, as far as the store knows what that
            makes of its pictures (`describe_features`); without that regions with much detail are taken.
    """

    def __init__(
        self,
        store: FeatureStore,
        *,
        threshold: float = 0.5,
        neighbours: Mapping[int, Sequence[int]] | None = None,
        embed: Embed | None = None,
    ) -> None:
        self.store = store
        self.threshold = threshold
        self.neighbours = neighbours
        self.embed = embed

    def find(
        self,
        feature: int,
        firing: Sequence[Example],
        silent: Sequence[Example],
        count: int,
        *,
        style: RegionStyle,
        rng: np.random.Generator,
    ) -> list[Place]:
        """Find regions of the given prompts; of each kind in turn, as far as there are any.

        Args:
            feature: which feature.
            firing: prompts in which it fires.
            silent: prompts in which it is silent.
            count: how many at most.
            style: how they will be shown: their margins are silent, too.
            rng: source of the choices.
        """
        pairs = list(strongest_spots(firing, threshold=self.threshold))
        kinds = [
            self._of_same_pictures(pairs, style, rng),
            self._of_neighbours(feature, firing, silent),
            self._similar(pairs, silent, style, rng),
        ]
        return in_turn(kinds, count)

    def _of_same_pictures(self, pairs: Sequence[Spot], style: RegionStyle, rng: np.random.Generator) -> list[Place]:
        """Take silent regions where others of these regions lie; anywhere, where there is none."""
        placed = {
            spot.example.prompt_id: region
            for spot, region in exchanged(pairs, len(pairs), margin_pixels=style.margin_pixels)
        }
        found = []
        for example, region in pairs:
            chosen = placed.get(example.prompt_id) or silent_region(
                example, region, rng, margin_pixels=style.margin_pixels
            )
            if chosen is not None:
                found.append(Place(example, chosen, "same picture"))
        return found

    def _of_neighbours(self, feature: int, firing: Sequence[Example], silent: Sequence[Example]) -> list[Place]:
        own = {one.prompt_id: one for one in (*silent, *firing)}
        found = []
        for other in self._neighbours_of(feature):
            for example in self._firing_examples(other):
                mine = own.get(example.prompt_id)
                if mine is None:
                    continue
                region = next(iter(find_regions(example, threshold=self.threshold)), None)
                if region is not None and _is_silent(mine, region):
                    found.append(Place(example, region, "neighbour"))
                    del own[example.prompt_id]
        return found

    def _neighbours_of(self, feature: int) -> Sequence[int]:
        if self.neighbours is not None:
            return self.neighbours.get(feature, ())
        described = self.store.description(feature)
        return [] if described is None else [one.feature for one in described.neighbours]

    def _firing_examples(self, feature: int) -> list[Example]:
        try:
            return [*self.store.examples(feature, "top", "image"), *self.store.examples(feature, "ordinary", "image")]
        except FeatureError:  # a store of some features only need not hold the neighbours of all of them
            return []

    def _similar(
        self,
        pairs: Sequence[Spot],
        silent: Sequence[Example],
        style: RegionStyle,
        rng: np.random.Generator,
    ) -> list[Place]:
        if not pairs:
            return []
        comparable = self.embed is not None or self.store.picture_vectors is not None
        places = []
        for number, example in enumerate(one for one in silent if one.images):
            like = as_large_in(example, int(rng.integers(len(example.images))), pairs[number % len(pairs)])
            tries = 0 if like is None else TRIED_REGIONS if comparable else 1
            drawn = (silent_region(example, like, rng, margin_pixels=style.margin_pixels) for _ in range(tries) if like)
            places.append([Place(example, region, "similar") for region in drawn if region is not None])
        groups = [group for group in places if group]
        return self._nearest(pairs, groups, style) if comparable else [group[0] for group in groups]

    def _nearest(self, pairs: Sequence[Spot], groups: Sequence[Sequence[Place]], style: RegionStyle) -> list[Place]:
        """Take of every picture the region nearest to where the feature fires, the nearest of all first."""
        flat = [place for group in groups for place in group]
        if not flat:
            return []
        where = _unit(self._vectors(pairs, style)).mean(axis=0)
        candidates = self._vectors([Spot(place.example, place.region) for place in flat], style)
        nearness = dict(zip(map(id, flat), (_unit(candidates) @ where).tolist(), strict=True))
        best = [max(group, key=lambda place: nearness[id(place)]) for group in groups]
        return sorted(best, key=lambda place: -nearness[id(place)])

    def _vectors(self, spots: Sequence[Spot], style: RegionStyle) -> Float[np.ndarray, "n d"]:
        """Give a vector of each region: of its crop, or of its place in what the vision tower made of the picture."""
        if self.embed is not None:
            return self.embed([crop(one.images[region.image], region, style) for one, region in spots])
        known = self.store.picture_vectors
        assert known is not None
        return np.stack(
            [
                known.region(one.image_ids[region.image], region.box, one.layout.image_sizes[0][region.image])
                for one, region in spots
            ]
        )


def _unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1.0))


def _is_silent(mine: Example, region: Region, *, silence: float = 0.05) -> bool:
    """Tell whether a feature is silent on every patch that a region touches, of both views."""
    if mine.kind == "silent":
        return True
    touched = mine.layout.tokens_in(region.box, image=region.image, min_overlap=0.0, view="all").numpy()
    return bool((mine.image_values[touched] <= silence * mine.max_image).all())


def in_turn(kinds: Sequence[Sequence[Place]], count: int) -> list[Place]:
    """Take from several lists in turn, each prompt once a list, until there are enough."""
    taken: list[Place] = []
    queues = [list(kind) for kind in kinds]
    while len(taken) < count and any(queues):
        for queue in queues:
            if queue and len(taken) < count:
                taken.append(queue.pop(0))
    return taken


def decoder_neighbours(sae: SAE, features: Iterable[int], *, count: int = 4) -> dict[int, list[int]]:
    """Find for some features those whose decoder directions are nearest by cosine.

    Args:
        sae: any SAE-Lens SAE.
        features: which.
        count: how many neighbours of each.
    """
    chosen = list(features)
    near = nearest_directions(sae, chosen, count=count)
    return dict(zip(chosen, near.features.tolist(), strict=True))
