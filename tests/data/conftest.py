"""Rows and datasets for the data tests."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from tests.data.data_samples import png


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Six rows with pictures as bytes, of which row 2 is corrupt."""
    return [
        {
            "image": {"bytes": b"not a picture" if index == 2 else png(), "path": None},
            "text": f"row {index}",
            "id": index,
        }
        for index in range(6)
    ]


@pytest.fixture
def image_dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """The same rows as a dataset whose picture column decodes."""
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
