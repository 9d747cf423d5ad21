"""Vectors of regions of stored pictures, against the vision tower's own tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sae_lens import SAE
from safetensors.numpy import load_file

import sae_lens_multimodal.features.picture_vectors as vectors_module
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.features.describe import DescriptionSettings, describe_features
from sae_lens_multimodal.features.embedding import TOWER_HOOK, tower_embedding
from sae_lens_multimodal.features.harvest import harvest
from sae_lens_multimodal.features.picture_vectors import (
    CELLS,
    PictureVectors,
    cell_boxes,
    tower_cells,
    write_picture_vectors,
)
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.scenes import make_scene
from sae_lens_multimodal.types import Box

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [make_scene(seed).image for seed in range(5)]


@pytest.fixture
def unprojected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep all numbers of the tiny model's vectors."""
    monkeypatch.setattr(vectors_module, "WIDTH", 4096)


def base_tokens(model: VisionLanguageModel, picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and unit vectors of the tokens of the view of the whole picture."""
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "."}]
    batch = model.encode([{"role": "user", "content": parts}])
    values = read_activations(model, batch, TOWER_HOOK)[TOWER_HOOK][0].float().numpy()
    base = (batch.layout.is_image & (batch.layout.tile == 0))[0].numpy()
    return batch.layout.boxes[0].numpy()[base], values[base] / np.linalg.norm(values[base], axis=1, keepdims=True)


@pytest.mark.usefixtures("unprojected")
def test_cells_are_means_of_the_tokens_over_them(model: VisionLanguageModel, pictures: list[Image.Image]) -> None:
    found = tower_cells(model, pictures)
    for picture, cells in zip(pictures, found, strict=True):
        boxes, tokens = base_tokens(model, picture)
        for cell, (x0, y0, x1, y1) in zip(cells, cell_boxes(picture.size).tolist(), strict=True):
            # tokens at many points of the cell
            xs, ys = (np.linspace(low, high, 42)[1:-1] for low, high in ((x0, x1), (y0, y1)))
            at = [
                int(
                    np.flatnonzero((boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3]))[0]
                )
                for x in xs
                for y in ys
            ]
            assert cell == pytest.approx(tokens[at].mean(axis=0), abs=0.03)


@pytest.mark.usefixtures("unprojected")
def test_the_mean_over_all_cells_is_that_of_all_tokens(model: VisionLanguageModel, pictures: list[Image.Image]) -> None:
    for picture, cells in zip(pictures, tower_cells(model, pictures), strict=True):
        _, tokens = base_tokens(model, picture)
        assert cells.mean(axis=0) == pytest.approx(tokens.mean(axis=0), abs=1e-4)


def test_a_region_is_the_mean_of_its_cells_as_stored(
    model: VisionLanguageModel, pictures: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors_module, "PICTURES_A_FILE", 2)
    names = [f"{number:02d}" for number in range(len(pictures))]
    opened = dict(zip(names, pictures, strict=True))
    write_picture_vectors(model, names, opened.__getitem__, tmp_path, batch_size=2, progress=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"0000{number}.safetensors" for number in range(3)]
    known, cells = PictureVectors(tmp_path, names), tower_cells(model, pictures)
    for index, (name, picture) in enumerate(opened.items()):
        width, height = picture.size
        whole = known.region(name, Box(0, 0, width, height), picture.size)
        assert whole == pytest.approx(cells[index].mean(axis=0), abs=1e-3)
        x, y = width / CELLS, height / CELLS
        one = known.region(name, Box(2 * x, 3 * y, 3 * x, 4 * y), picture.size)
        assert one == pytest.approx(cells[index, 3 * CELLS + 2], abs=1e-3)
        uneven = known.region(name, Box(0.5 * x, 0, 2 * x, y), picture.size)
        assert uneven == pytest.approx((0.5 * cells[index, 0] + cells[index, 1]) / 1.5, abs=1e-3)
    with pytest.raises(StoreError, match="picture 'none' is not among"):
        known.region("none", Box(0, 0, 1, 1), (10, 10))


def test_files_that_are_there_are_not_made_again(
    model: VisionLanguageModel, pictures: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors_module, "PICTURES_A_FILE", 2)
    names = ["a", "b", "c", "d", "e"]
    asked: list[str] = []

    def opened(name: str) -> Image.Image:
        if name == "e" and "e" not in asked:
            asked.append(name)
            raise KeyboardInterrupt
        asked.append(name)
        return pictures[names.index(name)]

    with pytest.raises(KeyboardInterrupt):
        write_picture_vectors(model, names, opened, tmp_path, progress=False)
    write_picture_vectors(model, names, opened, tmp_path, progress=False)
    assert asked == ["a", "b", "c", "d", "e", "e"]


def test_wide_vectors_are_projected_and_keep_their_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=4096)
    vectors = np.stack([common + scale * rng.normal(size=4096) for scale in (0.1, 0.3, 1, 1, 3)])

    def cosines(values: np.ndarray) -> np.ndarray:
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        return unit @ unit.T

    projection = vectors_module._projection(4096)
    assert projection.shape == (4096, 128)
    assert np.abs(cosines(vectors) - cosines(vectors @ projection)).max() < 0.2
    assert (vectors_module._projection(64) == np.eye(64)).all()


def test_described_stores_have_them_and_others_do_not(
    model: VisionLanguageModel, sae: SAE[Any], rows: Rows, tmp_path: Path
) -> None:
    store = harvest(
        model, sae, rows, tmp_path / "store", n_top=2, n_ordinary=2, n_silent=2, batch_size=4, progress=False
    )
    assert store.picture_vectors is None
    shutil.copytree(store.folder, tmp_path / "bare")
    options: dict[str, Any] = {"features": store.features[:3], "batch_size": 4, "progress": False}
    bare = describe_features(model, sae, tmp_path / "bare", settings=DescriptionSettings(crops=False), **options)
    assert bare.picture_vectors is None
    described = describe_features(model, sae, store, **options)
    assert described.image_ids == sorted(described.image_ids)
    known = described.picture_vectors
    assert known is not None
    embed = tower_embedding(model)
    for name in described.image_ids:
        picture = described.image(name)
        found = known.region(name, Box(0, 0, *picture.size), picture.size)
        whole = embed([picture])[0] @ vectors_module._projection(model.d_model)
        cosine = found @ whole / np.linalg.norm(found) / np.linalg.norm(whole)
        assert cosine > 0.95, "the mean of tokens of length 1 lies near that of the tokens"
    (file,) = sorted(described.paths.picture_vectors.iterdir())
    (vectors,) = load_file(file).values()
    assert vectors.shape == (len(described.image_ids), CELLS * CELLS, min(128, model.d_model))
    assert vectors.dtype == np.float16
    file.unlink()
    with pytest.raises(StoreError, match="describe the features anew"):
        described.reopened().picture_vectors.region(name, Box(0, 0, 9, 9), picture.size)  # type: ignore[union-attr]
