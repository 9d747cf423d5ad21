"""Opening pictures of every kind, so that what follows sees eight-bit RGB the right way up."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from sae_lens_multimodal.errors import ImageError

ImageSource: TypeAlias = "Image.Image | str | PathLike[str] | bytes | np.ndarray[Any, Any] | Mapping[str, Any]"
"""A picture as a PIL image, a path, the bytes of a file, a uint8 or uint16 array, or `{"bytes": ..., "path": ...}`."""

# What Pillow's readers raise for damaged files; it has no common base class for them.
_DAMAGED = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    struct.error,
    zlib.error,
)
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")


def open_image(source: ImageSource) -> Image.Image:
    """Open a picture and return it as eight-bit RGB, turned as its EXIF data says.

    Transparent pixels are laid over white; 16-bit and floating-point values are scaled to 8 bits, not cut off.

    Args:
        source: a PIL image, a path, the bytes of a file, an array of height x width (x channels) in uint8 or uint16,
            or a mapping with `bytes` or `path` as Hugging Face datasets give undecoded pictures.

    Raises:
        ImageError: the picture cannot be read, is of a kind that is not supported, or has no pixels.
    """
    picture = _read(source)
    label = describe_source(source)
    if picture.width == 0 or picture.height == 0:
        raise ImageError(f"{label} is {picture.width} x {picture.height} pixels; expected at least 1 x 1.")
    try:
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        return to_rgb(upright)
    except _DAMAGED as error:
        raise ImageError(
            f"{label} cannot be decoded ({type(error).__name__}: {error}); the file may be damaged. "
            "Give another picture or leave this prompt out."
        ) from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a decoded picture of any mode to eight-bit RGB."""
    if picture.mode in _SIXTEEN_BIT_MODES:
        return Image.fromarray(_sixteen_to_eight(np.asarray(picture))).convert("RGB")
    if picture.mode in ("I", "F"):
        return Image.fromarray(_numbers_to_eight(np.asarray(picture))).convert("RGB")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def describe_source(source: object) -> str:
    """Name a picture in an error message without printing its bytes."""
    if isinstance(source, (str, PathLike)):
        return f"picture {str(source)!r}"
    if isinstance(source, Mapping) and source.get("path"):
        return f"picture {str(source['path'])!r}"
    if isinstance(source, ImageFile.ImageFile) and source.filename:
        return f"picture {str(source.filename)!r}"
    return f"the given picture ({type(source).__name__})"


def _read(source: ImageSource) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Mapping):
        return _read(_from_mapping(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(source), source)
    if isinstance(source, (str, PathLike)):
        if str(source).startswith(("http://", "https://")):
            raise ImageError(f"{describe_source(source)} is an address; expected a local file. Download it first.")
        if not Path(source).is_file():
            raise ImageError(f"{describe_source(source)} does not exist; expected an image file.")
        return _open(Path(source), source)
    raise ImageError(
        f"got a {type(source).__name__} as a picture; expected a PIL image, a path, bytes, an array, "
        "or a mapping with 'bytes' or 'path'."
    )


def _from_mapping(source: Mapping[str, Any]) -> Any:  # noqa: ANN401 - checked by the caller
    inner = source.get("bytes") or source.get("path")
    if inner is None:
        raise ImageError(f"a picture mapping has the keys {sorted(map(str, source))}; expected 'bytes' or 'path'.")
    return inner


def _open(file: io.BytesIO | Path, source: object) -> Image.Image:
    try:
        return Image.open(file)
    except _DAMAGED as error:
        # Pillow's own words name the file object by its address, which differs from run to run
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "unknown format" if unknown else f"{type(error).__name__}: {error}"
        raise ImageError(
            f"{describe_source(source)} is not a readable image ({reason}). "
            "Give another picture or leave this prompt out."
        ) from error


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    plain = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not plain or array.dtype not in (np.uint8, np.uint16) or 0 in array.shape:
        raise ImageError(
            f"got an array of shape {array.shape} and type {array.dtype} as a picture; "
            "expected height x width (x 1, 3 or 4), not empty, in uint8 or uint16."
        )
    return Image.fromarray(_sixteen_to_eight(array) if array.dtype == np.uint16 else np.ascontiguousarray(array))


def _sixteen_to_eight(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _numbers_to_eight(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Scale whole or real numbers to 0…255: by their type's usual range where they fit it, else by their own range."""
    values = np.nan_to_num(array.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    real = np.issubdtype(array.dtype, np.floating)
    top = next((top for top in ((1.0, 255.0) if real else (255.0, 65535.0)) if low >= 0 and high <= top), None)
    if top is None:
        values, top = values - low, max(high - low, 1e-12)
    scaled: np.ndarray[Any, Any] = np.rint(values * (255.0 / top)).astype(np.uint8)
    return scaled
