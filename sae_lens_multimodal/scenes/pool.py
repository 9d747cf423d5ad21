"""A pool of pre-rendered training pictures: tiles, the label of every patch, and how tokens are laid out."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_lens_multimodal.scenes.crops import make_crop
from sae_lens_multimodal.scenes.tiny_config import GRIDS, PATCH, TILE, build_processor
from sae_lens_multimodal.scenes.words import ATTRIBUTES, HELD_OUT
from sae_lens_multimodal.scenes.world import MAX_OBJECTS, make_scene

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

    from sae_lens_multimodal.scenes.world import Scene

KIND_ORDER: tuple[str, ...] = ("colour", "texture", "shape", "glyph")
"""Columns of the attribute arrays."""
TRAINING_SEED = 2**40
"""First seed of the training scenes; evaluation and scene_rows with small seeds never come here."""
NEWLINE = -1
"""Mark of a newline token in the layout."""
SIDE = TILE // PATCH
PATCHES = SIDE * SIDE
CROPS_A_SCENE = 2
PART_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Pictures in flat arrays; picture i has tiles[tile_start[i]:tile_start[i + 1]], layouts likewise."""

    tiles: NDArray[np.uint8]
    """[all tiles, 48, 48, 3]; of every picture the base view first."""
    tile_start: NDArray[np.int64]
    owner: NDArray[np.int8]
    """[all tiles, 36]: the object that covers most of a patch, -1 background, -2 undecided."""
    layout: NDArray[np.int16]
    """[all tokens]: for every image token tile * 36 + patch, or NEWLINE."""
    layout_start: NDArray[np.int64]
    objects: NDArray[np.int8]
    """[pictures, 5, 4]: attribute values as indices in KIND_ORDER, -1 where none."""
    shown: NDArray[np.int8]
    """[pictures]: which object a crop shows; -1 for a scene."""
    seen: NDArray[np.int8]
    """[pictures, 4]: what can be seen of that object."""

    def attributes(self, picture: int) -> list[dict[str, str]]:
        """Return the attributes of every object of a picture."""
        return [decode(row) for row in self.objects[picture] if row[0] >= 0]

    def seen_attributes(self, picture: int) -> dict[str, str]:
        """Return what can be seen of the object a crop shows."""
        return decode(self.seen[picture])


def decode(row: NDArray[np.int8]) -> dict[str, str]:
    """Turn attribute indices into words."""
    return {kind: ATTRIBUTES[kind][row[k]] for k, kind in enumerate(KIND_ORDER) if row[k] >= 0}


def encode(attributes: dict[str, str]) -> list[int]:
    """Turn attributes into indices in KIND_ORDER, -1 where there is none."""
    return [ATTRIBUTES[kind].index(attributes[kind]) if kind in attributes else -1 for kind in KIND_ORDER]


def build_pool(folder: Path, n_scenes: int, *, workers: int = 2, first_seed: int = TRAINING_SEED) -> Pool:
    """Render scenes and crops of them, once; a later call with the same folder reads them.

    Args:
        folder: where the arrays are kept.
        n_scenes: how many scenes; there are CROPS_A_SCENE crops for each.
        workers: processes.
        first_seed: seed of the first scene.
    """
    path = folder / f"pool_{first_seed}_{n_scenes}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(first_seed, first_seed + n_scenes, 250)
        jobs = [range(start, min(start + 250, first_seed + n_scenes)) for start in starts]
        with ProcessPoolExecutor(workers) as executor:
            parts = list(executor.map(_render_seeds, jobs))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.npz")
        np.savez(temporary, allow_pickle=False, **columns)
        temporary.replace(path)
    with np.load(path) as found:
        stored = {name: found[name] for name in found.files}
    return _assemble(stored)


def _assemble(stored: dict[str, NDArray[Any]]) -> Pool:
    """Turn counts into starts."""
    starts = {
        "tile_start": np.concatenate([[0], np.cumsum(stored.pop("n_tiles"))]),
        "layout_start": np.concatenate([[0], np.cumsum(stored.pop("n_tokens"))]),
    }
    return Pool(**stored, **starts)


def _render_seeds(seeds: range) -> dict[str, NDArray[Any]]:
    """Render the scenes of some seeds and their crops."""
    rows = [row for seed in seeds for row in _render_one(seed)]
    stacked = {name: np.concatenate([row[name] for row in rows]) for name in ("tiles", "owner", "layout")}
    single = {name: np.stack([row[name] for row in rows]) for name in ("objects", "shown", "seen")}
    counts = {
        "n_tiles": np.array([len(row["tiles"]) for row in rows]),
        "n_tokens": np.array([len(row["layout"]) for row in rows]),
    }
    return {**stacked, **single, **counts}


def _render_one(seed: int) -> list[dict[str, NDArray[Any]]]:
    """Render one scene and its crops."""
    rng = np.random.default_rng((seed, 2))
    scene = make_scene(seed, exclude=HELD_OUT)
    owner = owner_map(scene)
    objects = np.full((MAX_OBJECTS, len(KIND_ORDER)), -1, dtype=np.int8)
    for k, one in enumerate(scene.objects):
        objects[k] = encode(one.attributes)
    nothing = np.full(len(KIND_ORDER), -1, dtype=np.int8)
    rows: list[dict[str, NDArray[Any]]] = [
        {**tokenise(scene.image, owner), "objects": objects, "shown": np.array(-1, dtype=np.int8), "seen": nothing}
    ]
    for _ in range(CROPS_A_SCENE):
        index = int(rng.integers(len(scene.objects)))
        crop = make_crop(scene, index, rng, part=bool(rng.random() < PART_SHARE))
        x0, y0, x1, y1 = crop.box
        shown = {"shown": np.array(index, dtype=np.int8), "seen": np.array(encode(crop.attributes), dtype=np.int8)}
        rows.append({**tokenise(crop.image, owner[y0:y1, x0:x1]), "objects": objects, **shown})
    return rows


def owner_map(scene: Scene) -> NDArray[np.int8]:
    """Return which object each pixel belongs to: [H, W], -1 for background."""
    owner = np.full((scene.image.height, scene.image.width), -1, dtype=np.int8)
    for k, one in enumerate(scene.objects):
        owner[one.mask] = k
    return owner


@functools.cache
def _image_processor() -> Any:  # noqa: ANN401 - a transformers class
    """Build the image processor once a process."""
    return build_processor().image_processor


def tokenise(image: Image.Image, owner: NDArray[np.int8]) -> dict[str, NDArray[Any]]:
    """Cut a picture into tiles as the processor does, and label every patch.

    Args:
        image: RGB.
        owner: which object each pixel belongs to, [H, W].

    Returns:
        tiles [t, 48, 48, 3], owner [t, 36], layout [tokens].
    """
    values = _image_processor()(image, return_tensors="np")["pixel_values"][0]
    tiles = np.rint((values.transpose(0, 2, 3, 1) * 0.5 + 0.5) * 255).astype(np.uint8)
    labels = np.stack([_patch_labels(tile) for tile in _owner_tiles(owner)])
    return {"tiles": tiles, "owner": labels, "layout": token_layout(image.height, image.width)}


def _owner_tiles(owner: NDArray[np.int8]) -> list[NDArray[np.int8]]:
    """Carry an owner map through the processor's geometry: base view, then the tiles row by row."""
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

    height, width = select_best_resolution(owner.shape, [list(grid) for grid in GRIDS])
    fine_height, fine_width = _output_size(get_patch_output_size, owner.shape, (height, width))
    canvas = np.full((height, width), -1, dtype=np.int8)
    top, left = (height - fine_height) // 2, (width - fine_width) // 2
    canvas[top : top + fine_height, left : left + fine_width] = _nearest(owner, fine_height, fine_width)
    rows, columns = range(0, height, TILE), range(0, width, TILE)
    return [_nearest(owner, TILE, TILE), *[canvas[y : y + TILE, x : x + TILE] for y in rows for x in columns]]


def _output_size(
    rule: Callable[..., tuple[int, int]], shape: tuple[int, int], target: tuple[int, int]
) -> tuple[int, int]:
    """Ask transformers how large a picture becomes inside a grid."""
    from transformers.image_utils import ChannelDimension

    return rule(np.empty((*shape, 3), dtype=np.uint8), target, ChannelDimension.LAST)


def _nearest(owner: NDArray[np.int8], height: int, width: int) -> NDArray[np.int8]:
    """Resize labels to the nearest pixel."""
    y = ((np.arange(height) + 0.5) * owner.shape[0] / height).astype(int)
    x = ((np.arange(width) + 0.5) * owner.shape[1] / width).astype(int)
    return owner[y][:, x]


def _patch_labels(tile: NDArray[np.int8]) -> NDArray[np.int8]:
    """Label every patch of a tile: [36]; an object needs a quarter of it, and twice what the next one has."""
    cells = tile.reshape(SIDE, PATCH, SIDE, PATCH).transpose(0, 2, 1, 3).reshape(PATCHES, -1)
    shares = np.stack([(cells == k).mean(axis=1) for k in range(MAX_OBJECTS)])
    best, ordered = shares.argmax(axis=0), np.sort(shares, axis=0)
    label = np.where(ordered[-1] >= 0.25, best, np.where(ordered[-1] > 0.04, -2, -1))
    return np.where((ordered[-1] >= 0.04) & (ordered[-2] > 0.5 * ordered[-1]), -2, label).astype(np.int8)


@functools.cache
def token_layout(height: int, width: int) -> NDArray[np.int16]:
    """Ask transformers where the patches of a picture go in the sequence: [tokens], tile * 36 + patch or NEWLINE."""
    import torch
    from transformers.image_processing_utils import select_best_resolution

    grid = select_best_resolution((height, width), [list(one) for one in GRIDS])
    n_tiles = 1 + (grid[0] // TILE) * (grid[1] // TILE)
    coordinates = torch.arange(n_tiles * PATCHES, dtype=torch.float32).view(n_tiles, PATCHES, 1)
    packed, _ = _reference_model().pack_image_features(
        [coordinates],
        torch.tensor([[height, width]]),
        vision_feature_select_strategy="default",
        image_newline=torch.tensor([float(NEWLINE)]),
    )
    return packed[0].view(-1).to(torch.int16).numpy()


@functools.cache
def _reference_model() -> Any:  # noqa: ANN401 - a transformers class
    """Build a model whose packing rule is asked for; its weights do not matter."""
    from sae_lens_multimodal.scenes.tiny_config import build_model

    return build_model().model
