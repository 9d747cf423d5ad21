"""What the model's own vision tower makes of every place of a store's pictures, to compare regions without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.features.embedding import TOWER_HOOK
from sae_lens_multimodal.files import write_atomically
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.types import Box

CELLS = 8
"""Rows and columns of the grid that is laid over every picture."""
WIDTH = 128
"""Numbers of a cell, at most: wider vectors are projected at random, which keeps cosines (Johnson, Lindenstrauss)."""
PICTURES_A_FILE = 512
_NAME = "vectors"
_OPEN_FILES = 16
_SEED = 0


class PictureVectors:
    """Vectors of regions of a store's pictures.

    Args:
        folder: where `write_picture_vectors` wrote.
        image_ids: of all pictures of the store, ascending.
    """

    def __init__(self, folder: Path, image_ids: Sequence[str]) -> None:
        self._folder = folder
        self._index = {image_id: index for index, image_id in enumerate(image_ids)}
        self._opened = lru_cache(maxsize=_OPEN_FILES)(self._open)

    def region(self, image_id: str, box: Box, size: tuple[int, int]) -> Float[np.ndarray, "d"]:
        """Give the mean vector of a part of a picture, each cell counted by how much of it the box covers.

        Args:
            image_id: which picture.
            box: which part, in pixels.
            size: the picture's width and height.

        Raises:
            StoreError: the store has no such picture.
        """
        index = self._index.get(image_id)
        if index is None:
            raise StoreError(f"picture {image_id!r} is not among those of {self._folder}; see images.parquet.")
        cells = self._opened(index // PICTURES_A_FILE).get_slice(_NAME)[index % PICTURES_A_FILE]
        shares = _overlaps(cell_boxes(size), np.array([box], dtype=np.float64))[:, 0]
        return np.asarray(np.average(np.asarray(cells, dtype=np.float64), axis=0, weights=shares))

    def _open(self, number: int) -> Any:  # noqa: ANN401 - safetensors gives no type
        path = _file(self._folder, number)
        if not path.is_file():
            raise StoreError(f"{path} does not exist; delete {self._folder.parent} and describe the features anew.")
        return safe_open(path, framework="numpy")


def write_picture_vectors(
    model: VisionLanguageModel,
    image_ids: Sequence[str],
    opened: Callable[[str], Image.Image],
    folder: Path,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> None:
    """Write the vectors of pictures, `PICTURES_A_FILE` to a file; files that are there are kept.

    One pass of the vision tower over all pictures; on disk 2 * CELLS * CELLS * WIDTH bytes a picture, 16 KiB, at most.

    Args:
        model: the model that was harvested.
        image_ids: content names of all pictures of the store, ascending.
        opened: opens a picture by its name.
        folder: where to.
        batch_size: pictures to a forward pass.
        progress: show a bar on stderr.
    """
    with tqdm(total=len(image_ids), unit="picture", desc="look", disable=not progress) as bar:
        for number, start in enumerate(range(0, len(image_ids), PICTURES_A_FILE)):
            part = image_ids[start : start + PICTURES_A_FILE]
            if not _file(folder, number).is_file():
                parts = [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
                vectors = np.concatenate([tower_cells(model, [opened(name) for name in names]) for names in parts])
                _save(_file(folder, number), vectors)
            bar.update(len(part))


def _save(file: Path, vectors: Float[np.ndarray, "n cells d"]) -> None:
    write_atomically(file, lambda temporary: save_file({_NAME: vectors.astype(np.float16)}, temporary))


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def tower_cells(model: VisionLanguageModel, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "n cells d"]:
    """Give for every cell of a grid over each picture the mean of what the vision tower makes of the patches there.

    Of the projected tokens of the view of the whole picture, each of length 1, counted by how much of the cell they
    cover; where their places are not known, all cells have the picture's mean.

    Args:
        model: the vision-language model.
        pictures: of any size.

    Returns:
        Cells row by row; `WIDTH` numbers each, or as many as the model has where these are fewer.
    """
    parts = [[{"type": "image", "image": one}, {"type": "text", "text": "."}] for one in pictures]
    batch = model.encode([[{"role": "user", "content": part}] for part in parts])
    values = read_activations(model, batch.to(model.device), TOWER_HOOK)[TOWER_HOOK].float().cpu().numpy()
    found = [_cells(values[row], batch.layout.row(row)) for row in range(len(pictures))]
    return np.stack(found) @ _projection(values.shape[-1])


def _cells(values: Float[np.ndarray, "seq d"], layout: TokenLayout) -> Float[np.ndarray, "cells d"]:
    base = np.asarray(layout.is_image[0]) & (np.asarray(layout.tile[0]) == 0)
    boxes = np.asarray(layout.places[0], dtype=np.float64)[base]
    unit = values[base] / np.maximum(np.linalg.norm(values[base], axis=1, keepdims=True), 1e-12)
    shares = _overlaps(cell_boxes(layout.image_sizes[0][0]), boxes)
    # a cell that no patch reaches, if a processor cuts the picture's edge off, has the mean of all
    shares[shares.sum(axis=1) <= 0] = 1.0
    return np.asarray(shares @ unit / shares.sum(axis=1, keepdims=True))


def _projection(width: int) -> Float[np.ndarray, "d k"]:
    if width <= WIDTH:
        return np.eye(width)
    return np.random.default_rng(_SEED).standard_normal((width, WIDTH)) / np.sqrt(WIDTH)


def cell_boxes(size: tuple[int, int]) -> Float[np.ndarray, "cells 4"]:
    """Give the boxes of the cells of a picture, row by row, in pixels.

    Example:
        >>> cell_boxes((80, 160))[[0, 1, 8]].tolist()
        [[0.0, 0.0, 10.0, 20.0], [10.0, 0.0, 20.0, 20.0], [0.0, 20.0, 10.0, 40.0]]
    """
    rows, columns = np.divmod(np.arange(CELLS * CELLS), CELLS)
    low = np.stack([columns, rows], axis=1)
    return np.concatenate([low, low + 1], axis=1) * np.tile(np.array(size) / CELLS, 2)


def _overlaps(first: Float[np.ndarray, "n 4"], second: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Area that each pair of boxes shares."""
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    return np.asarray(np.maximum(high - low, 0.0).prod(axis=2))
