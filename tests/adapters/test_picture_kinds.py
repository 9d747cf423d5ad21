"""Pictures of every kind open as eight-bit RGB, and damaged ones say so."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sae_lens_multimodal.adapters.images import open_image
from sae_lens_multimodal.errors import ImageError


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(source: Any) -> np.ndarray[Any, Any]:
    opened = open_image(source)
    assert opened.mode == "RGB"
    return np.asarray(opened)


RED = Image.new("RGB", (4, 3), (200, 10, 20))


def test_rgb_is_taken_as_it_is() -> None:
    assert (pixels(RED) == (200, 10, 20)).all()


def test_every_way_to_give_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(encoded(RED))
    content = path.read_bytes()
    for source in (path, str(path), content, {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}):
        assert (pixels(source) == np.asarray(RED)).all()
    assert (pixels(np.asarray(RED)) == np.asarray(RED)).all()
    assert (pixels({"bytes": content}) == np.asarray(RED)).all()


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_becomes_three_equal_channels(mode: str) -> None:
    got = pixels(encoded(Image.new(mode, (2, 2), 1 if mode == "1" else 77)))
    assert (got == (255 if mode == "1" else 77)).all()


def test_transparent_pixels_lie_over_white() -> None:
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    got = pixels(encoded(Image.fromarray(rgba)))
    assert got[0, 0].tolist() == [255, 0, 0]
    assert got[0, 1].tolist() == [255, 255, 255]
    assert np.abs(got[0, 2].astype(int) - 127).max() <= 1


def test_grey_with_transparency_lies_over_white() -> None:
    got = pixels(encoded(Image.fromarray(np.array([[[40, 255], [40, 0]]], dtype=np.uint8), "LA")))
    assert got[0].tolist() == [[40] * 3, [255] * 3]


def test_palette_with_and_without_transparency() -> None:
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([10, 20, 30, 200, 100, 50])
    indexed.putpixel((1, 0), 1)
    assert pixels(encoded(indexed))[0].tolist() == [[10, 20, 30], [200, 100, 50]]
    assert pixels(encoded(indexed, transparency=0))[0].tolist() == [[255, 255, 255], [200, 100, 50]]


def test_rgb_with_a_transparent_colour() -> None:
    two = Image.fromarray(np.array([[[1, 2, 3], [9, 8, 7]]], dtype=np.uint8))
    assert pixels(encoded(two, transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [9, 8, 7]]


def test_sixteen_bits_are_scaled_not_cut_off() -> None:
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(grey)))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert pixels(grey)[0, :, 0].tolist() == [0, 1, 128, 255]
    rgb = np.stack([grey] * 3, axis=-1)
    assert pixels(rgb)[0, :, 1].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[0, 32896, 65535]], np.int32), [0, 128, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 128.0, 255.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, np.nan, 1.0]], np.float32), [0, 0, 255]),
        (np.array([[5.0, 5.0, 5.0]], np.float32), [5, 5, 5]),
    ],
)
def test_whole_and_real_numbers(values: np.ndarray[Any, Any], expected: list[int]) -> None:
    got = pixels(encoded(Image.fromarray(values), "TIFF"))[0, :, 0]
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_cmyk_and_ycbcr() -> None:
    assert (pixels(encoded(Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "TIFF")) == 255).all()
    assert (pixels(encoded(Image.new("CMYK", (2, 2), (0, 0, 0, 255)), "TIFF")) == 0).all()
    cyan = pixels(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100))
    assert np.abs(cyan.astype(int) - (0, 255, 255)).max() <= 4
    assert np.abs(pixels(RED.convert("YCbCr")).astype(int) - (200, 10, 20)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = open_image(encoded(stored, exif=exif))
    assert got.size == (3, 2)
    assert (np.asarray(got) == np.asarray(upright)).all()


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("P", (3, 3), index) for index in range(2)]
    for frame in frames:
        frame.putpalette([0, 200, 0, 200, 0, 0])
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(content) == (0, 200, 0)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning", "ignore:Truncated File Read:UserWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_files_are_image_errors(form: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, form)
    # a GIF that ends early is filled up by Pillow with what there is
    cuts = (10, len(content) // 2) if form not in ("GIF", "BMP") else (10,)
    for cut in cuts:
        with pytest.raises(ImageError, match="given picture"):
            open_image(content[:cut])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_never_raise_anything_else() -> None:
    generator = np.random.default_rng(1)
    good = bytearray(encoded(RED.resize((40, 40))))
    for _ in range(200):
        bad = bytearray(good)
        for place in generator.integers(0, len(bad), 4):
            bad[place] = generator.integers(0, 256)
        try:
            open_image(bytes(bad))
        except ImageError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"no picture at all",
        "does/not/exist.png",
        "https://example.org/cat.png",
        {},
        {"bytes": None, "path": None},
        7,
        None,
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((2, 2), np.float64),
        np.zeros((0, 2), np.uint8),
        Image.new("RGB", (0, 5)),
    ],
    ids=str,
)
def test_what_is_no_picture(source: Any) -> None:
    with pytest.raises(ImageError):
        open_image(source)


def test_the_message_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(encoded(RED, "JPEG")[:40])
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        open_image(path)
