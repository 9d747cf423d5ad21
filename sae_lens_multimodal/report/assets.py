"""The picture files of a report: each written once, named by its content."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from sae_lens_multimodal.errors import ImageError
from sae_lens_multimodal.files import write_bytes
from sae_lens_multimodal.report.view import PictureView

if TYPE_CHECKING:
    from pathlib import Path

    from sae_lens_multimodal.features.example import StoredPrompt

FOLDER = "assets"
MAX_SIDE = 640
"""Pixels; larger pictures are made smaller."""
_SMALL_AREA = 256 * 256
"""Up to so many pixels a picture is kept without loss."""


class Assets:
    """Writes pictures into a report's folder and gives their relative addresses."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, PictureView] = {}
        self._stored: dict[str, PictureView] = {}

    def picture(self, image: Image.Image, *, alt: str) -> PictureView:
        """Write a picture, made smaller where it is large."""
        return replace(self._write(_shrunk(image.convert("RGB"))), alt=alt)

    def of_prompt(self, prompt: StoredPrompt, image: int, *, alt: str) -> PictureView:
        """Write a picture of a stored prompt; one that many features share is opened only once."""
        name = prompt.image_ids[image]
        if name not in self._stored:
            self._stored[name] = self.picture(prompt.images[image], alt="")
        return replace(self._stored[name], alt=alt)

    def picture_of(self, source: Image.Image | Path, *, alt: str) -> PictureView:
        """Write a picture that is at hand or in a file.

        Raises:
            ImageError: the file is no picture, or is missing.
        """
        if isinstance(source, Image.Image):
            return self.picture(source, alt=alt)
        try:
            with Image.open(source) as opened:
                return self.picture(opened, alt=alt)
        except (OSError, UnidentifiedImageError) as error:
            raise ImageError(
                f"{source} cannot be opened as a picture ({error}); give the report another file."
            ) from error

    def _write(self, image: Image.Image) -> PictureView:
        pixels = hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()[:24]
        if pixels not in self._known:
            content, suffix = _encoded(image)
            url = f"{FOLDER}/{pixels[:2]}/{pixels[2:]}{suffix}"
            path = self._folder / url
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_bytes(path, content)
            self._known[pixels] = PictureView(url=url, width=image.width, height=image.height)
        return self._known[pixels]


def _shrunk(image: Image.Image) -> Image.Image:
    """Return the picture with its longer side at most `MAX_SIDE`."""
    factor = MAX_SIDE / max(image.size)
    if factor >= 1:
        return image
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)


def _encoded(image: Image.Image) -> tuple[bytes, str]:
    """Encode without loss where that is small, as JPEG where it is not."""
    buffer = io.BytesIO()
    if image.width * image.height <= _SMALL_AREA:
        image.save(buffer, "WEBP", lossless=True, method=1)
        return buffer.getvalue(), ".webp"
    image.save(buffer, "JPEG", quality=86)
    return buffer.getvalue(), ".jpg"
