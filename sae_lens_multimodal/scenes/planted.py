"""Planted features: attributes of the scenes with their regions, for calibrating judges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sae_lens_multimodal.autointerp.calibration import PlantedFeature, PlantedRegion
from sae_lens_multimodal.scenes.words import ATTRIBUTES, phrase_of
from sae_lens_multimodal.scenes.world import Scene, SceneObject, make_scene
from sae_lens_multimodal.types import Box

FIRST_SEED = 2**45
"""Scenes that neither training nor evaluation uses."""
PATCH_PIXELS = 8.0
"""As wide as a patch of the tiny model, in a picture that fills a tile."""


def planted_features(
    count: int = 24, *, n_regions: int = 3, seed: int = 0, kinds: Sequence[str] = ("colour", "shape", "texture")
) -> list[PlantedFeature]:
    """Plant features that stand for single attributes, kind by kind in turn.

    Args:
        count: how many; an attribute may come again, on other pictures.
        n_regions: objects that have it, each of another scene.
        seed: chooses attributes and scenes.
        kinds: of attributes.

    Example:
        >>> [one.concept for one in planted_features(3, n_regions=1)]
        ['green', 'circle', 'striped']
    """
    rng = np.random.default_rng((seed, 45))
    scene_seed = FIRST_SEED + 100_000 * seed
    found = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        values = ATTRIBUTES[kind]
        value, other = (values[index] for index in rng.permutation(len(values))[:2].tolist())
        regions: list[PlantedRegion] = []
        while len(regions) < n_regions:
            scene_seed += 1
            scene = make_scene(scene_seed)
            target = _target(scene, kind, value, other)
            if target is not None:
                box = Box(*map(float, target.box))
                regions.append(PlantedRegion(picture=scene.image, box=box, patch_pixels=PATCH_PIXELS))
        found.append(
            PlantedFeature(concept=phrase_of({kind: value}), other=phrase_of({kind: other}), regions=tuple(regions))
        )
    return found


def _target(scene: Scene, kind: str, value: str, other: str) -> SceneObject | None:
    """Find an object with the value, in a scene where no object has the other one."""
    values = [one.attributes.get(kind) for one in scene.objects]
    return scene.objects[values.index(value)] if value in values and other not in values else None
