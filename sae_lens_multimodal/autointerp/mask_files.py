"""Masks that lie in a folder: PNG files, and a list of which explanation and picture each belongs to."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool
from PIL import Image, UnidentifiedImageError

from sae_lens_multimodal.autointerp.records import json_lines
from sae_lens_multimodal.errors import StoreError

if TYPE_CHECKING:
    from sae_lens_multimodal.features.example import Example

LIST = "masks.jsonl"
"""Every line holds `explanation`, `image` (the picture's content name in the feature store) and `mask`, a file of the
same folder whose pixels are not 0 where the thing is. Several lines for the same two are put together."""


class FolderMasks:
    """A `MaskOf` that looks masks up.

    Explanations are compared without regard to case and blanks. A line without `mask`, or with null there, says that
    the picture does not show the thing; what has no line is not known.

    Args:
        folder: with the list `masks.jsonl`.

    Raises:
        StoreError: the list is missing, or a line has another shape.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._files: dict[tuple[str, str], list[Path]] = defaultdict(list)
        for number, record in json_lines(self.folder / LIST):
            explanation, image, mask = (record.get(name) for name in ("explanation", "image", "mask"))
            if not (isinstance(explanation, str) and isinstance(image, str) and isinstance(mask, str | None)):
                raise StoreError(
                    f'{self.folder / LIST}, line {number}: expected {{"explanation": text, "image": content name of '
                    f'the picture, "mask": file}}, got {record}.'
                )
            self._files[_words(explanation), image] += [] if mask is None else [self.folder / mask]

    @property
    def source(self) -> str:
        """Where the masks come from, recorded with the results."""
        return f"masks in {self.folder.resolve().name}"

    def __call__(self, text: str, example: Example, image: int) -> Bool[np.ndarray, "h w"] | None:
        """Look up what an explanation names in one picture of an example."""
        files = self._files.get((_words(text), example.image_ids[image]))
        if files is None:
            return None
        picture = example.images[image]
        found = np.zeros((picture.height, picture.width), dtype=bool)
        for file in files:
            mask = _read(file)
            if mask.shape != found.shape:
                raise StoreError(
                    f"{file} is {mask.shape}, its picture {found.shape}, both (height, width); give masks of the "
                    "original picture."
                )
            found |= mask
        return found


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


def _read(file: Path) -> Bool[np.ndarray, "h w"]:
    try:
        with Image.open(file) as picture:
            pixels = np.asarray(picture)
    except (OSError, UnidentifiedImageError) as error:
        raise StoreError(f"{file} is no mask ({error}); expected a PNG file with the size of its picture.") from error
    return np.asarray(pixels != 0) if pixels.ndim == 2 else np.asarray((pixels[..., :3] != 0).any(axis=-1))
