"""The picture files of a report: each written once, named by its content."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from sae_lens_multimodal.errors import ImageError
from sae_lens_multimodal.report.colours import heat_rgba
from sae_lens_multimodal.report.view import PictureView

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float

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

    def picture(self, image: Image.Image, *, alt: str) -> PictureView:
        """Write a picture, made smaller where it is large."""
        return self._write(_shrunk(image.convert("RGB"), MAX_SIDE), alt)

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

    def heat(self, levels: Float[np.ndarray, "h w"]) -> PictureView:
        """Write a heat map (levels 0 to 1 over the original picture) as a layer with transparency."""
        layer = Image.fromarray(heat_rgba(levels), "RGBA")
        return self._write(_shrunk(layer, MAX_SIDE, Image.Resampling.NEAREST), "")

    def _write(self, image: Image.Image, alt: str) -> PictureView:
        pixels = hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()[:24]
        if pixels not in self._known:
            content, suffix = _encoded(image)
            url = f"{FOLDER}/{pixels[:2]}/{pixels[2:]}{suffix}"
            path = self._folder / url
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self._known[pixels] = PictureView(url=url, width=image.width, height=image.height)
        known = self._known[pixels]
        return PictureView(url=known.url, width=known.width, height=known.height, alt=alt)


def _shrunk(image: Image.Image, max_side: int, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """Return the picture with its longer side at most `max_side`."""
    factor = max_side / max(image.size)
    if factor >= 1:
        return image
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), resample)


def _encoded(image: Image.Image) -> tuple[bytes, str]:
    """Encode without loss where that is small, as JPEG where it is not."""
    buffer = io.BytesIO()
    if image.mode == "RGBA":
        image.save(buffer, "PNG", optimize=True)
        return buffer.getvalue(), ".png"
    if image.width * image.height <= _SMALL_AREA:
        image.save(buffer, "WEBP", lossless=True, method=3)
        return buffer.getvalue(), ".webp"
    image.save(buffer, "JPEG", quality=86, optimize=True)
    return buffer.getvalue(), ".jpg"
