"""Opening a picture from whatever a dataset row refers to it by."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
from PIL import Image

from sae_lens_multimodal.adapters.images import open_image
from sae_lens_multimodal.errors import ImageError

_DOWNLOADED_SCHEMES = ("http", "https", "ftp")


def open_picture(reference: object, *, folder: Path | None = None) -> Image.Image:
    """Open a picture: upright, RGB.

    Args:
        reference: A PIL image, bytes, a path, a `data:` URL, or a mapping with `bytes` and `path` as datasets store it.
            A path may be one of a streamed dataset (`hf://...`, `zip://...::...`). Web addresses are not followed: what
            a run sees must not depend on what a server answers.
        folder: Where relative paths begin; the working folder if None.

    Raises:
        ImageError: there is no picture, or it cannot be read.
    """
    if isinstance(reference, Mapping):
        content, path = reference.get("bytes"), reference.get("path")
        if content is not None:
            return open_image(bytes(content))
        if not path:
            raise ImageError("Got a picture with neither bytes nor a path; expected one of them.")
        reference = path
    if isinstance(reference, Path):
        reference = str(reference)
    if isinstance(reference, str):
        reference = _resolve(reference, folder)
    opened: Image.Image = open_image(_checked(reference))
    return opened


def _checked(reference: object) -> Any:  # noqa: ANN401 - any of what open_image takes
    if reference is None:
        raise ImageError("Got no picture where one was expected.")
    return reference


def _resolve(reference: str, folder: Path | None) -> bytes | Path:
    if reference.startswith("data:"):
        return _data_url(reference)
    scheme = reference.split("://", 1)[0] if "://" in reference else ""
    if scheme in _DOWNLOADED_SCHEMES and "::" not in reference:
        raise ImageError(f"Got the web address {reference[:80]}; download the pictures first, or give them as bytes.")
    if scheme:
        return _read_remote(reference)
    path = Path(reference)
    return path if folder is None or path.is_absolute() else folder / path


def _data_url(url: str) -> bytes:
    head, comma, content = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ImageError(f"Got the data URL {url[:40]}...; expected one that is base64-encoded.")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ImageError(f"Got the data URL {url[:40]}... whose base64 is broken ({error}).") from error


def _read_remote(address: str) -> bytes:
    try:
        with fsspec.open(address, "rb") as file:
            return bytes(file.read())
    except (OSError, ValueError, ImportError) as error:
        raise ImageError(f"Got {address[:80]}, which cannot be read ({error}).") from error
