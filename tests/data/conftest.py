"""Rows and datasets for the data tests."""

from __future__ import annotations

import io
from typing import Any

import datasets
import pytest
from PIL import Image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def png(colour: tuple[int, int, int] = RED, size: tuple[int, int] = (8, 6)) -> bytes:
    """The bytes of a picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Six rows with pictures as bytes, of which row 2 is corrupt."""
    return [
        {"image": {"bytes": b"not a picture" if index == 2 else png(), "path": None}, "text": f"row {index}", "id": index}
        for index in range(6)
    ]


@pytest.fixture
def image_dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """The same rows as a dataset whose picture column decodes."""
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
