"""Pictures that show the same though their pixels differ: resized, recompressed, a little brighter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt64
from PIL import Image
from torch import Tensor

NEAR_BITS: Final = 16
"""Of the 384 bits of two pictures' hashes so many may differ: most copies do in fewer, hardly any other picture."""
REMEMBERED: Final = 1 << 20
"""Pictures that later ones are compared with, the newest of those unlike all before; 72 bytes each."""

_ROWS, _COLUMNS = 16, 17
_WORDS = 6
_MARGIN = 2
"""Steps of brightness (of 255) that count as none: the noise of recompression in a flat area."""
_MOST_SHIFT = 20.0
"""By so much (of 255) the mean of each colour channel may differ; flat pictures differ in nothing else."""


class PictureHash(NamedTuple):
    """What a picture looks like from afar."""

    words: UInt64[np.ndarray, "6"]
    """256 bits of brightness and twice 64 of colour."""
    mean: Float32[np.ndarray, "3"]
    """Mean of red, green and blue, 0 to 255."""


def picture_hash(picture: Image.Image) -> PictureHash:
    """Hash a picture so that copies of it have almost the same bits.

    A difference hash (dHash): each bit says whether a cell of a small copy is brighter than its left neighbour. Here
    with 16 x 16 cells for brightness and 8 x 8 for each of both colour differences, so that things of other colours
    are told apart, and with a margin, so that noise in flat areas counts as none.
    """
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    small = rgb.resize((4 * _COLUMNS, 2 * _ROWS), Image.Resampling.BOX, reducing_gap=2.0)
    luma = small.resize((_COLUMNS, _ROWS), Image.Resampling.BOX).convert("YCbCr").getchannel(0)
    colour = small.resize((_COLUMNS // 2 + 1, _ROWS // 2), Image.Resampling.BOX).convert("YCbCr")
    planes = [luma, colour.getchannel(1), colour.getchannel(2)]
    steps = [np.diff(np.asarray(plane, dtype=np.int16), axis=1) > _MARGIN for plane in planes]
    bits = np.concatenate([step.reshape(-1) for step in steps])
    mean = np.asarray(small, dtype=np.float32).reshape(-1, 3).mean(axis=0)
    return PictureHash(np.packbits(bits).view(np.uint64), mean)


class NearPictures:
    """Gives every picture the content name of the first one that looked like it.

    A picture is compared with the first of each kind only, not with all (leader clustering; Hartigan 1975), so no chain
    of small changes joins unlike pictures. What a picture is given depends on those before it and on nothing else.

    Memory: 72 bytes for each of the last `remembered` pictures that were like none before.

    Args:
        max_bits: Bits of the hash that may differ; below 0 only equal pictures are alike.
        remembered: Pictures to compare with.
    """

    def __init__(self, max_bits: int = NEAR_BITS, *, remembered: int = REMEMBERED) -> None:
        self.max_bits = max_bits
        self._limit = remembered
        self._count = 0
        """Pictures that were like none before, ever."""
        self._words = np.zeros((0, _WORDS), dtype=np.uint64)
        self._means = np.zeros((0, 3), dtype=np.float32)
        self._names = np.zeros((0, 16), dtype=np.uint8)

    def first_like(self, name: str, picture: Image.Image) -> str:
        """Content name of the first picture that looked like this one; its own if there was none."""
        if self.max_bits < 0:
            return name
        words, mean = picture_hash(picture)
        held = min(self._count, self._limit)
        bits = np.bitwise_count(self._words[:held] ^ words).sum(axis=1, dtype=np.int64)
        shift = np.abs(self._means[:held] - mean).max(axis=1)
        found = np.flatnonzero((bits <= self.max_bits) & (shift <= _MOST_SHIFT))
        if found.size:
            # Ages ascend with the slot up to the one that is written next, where the oldest lie.
            oldest = found[np.argmin((found - self._count) % self._limit)] if self._count > self._limit else found[0]
            return self._names[oldest].tobytes().hex()
        self._remember(name, words, mean)
        return name

    def _remember(self, name: str, words: np.ndarray, mean: np.ndarray) -> None:
        slot = self._count % self._limit
        if slot == len(self._words):
            grown = min(max(2 * slot, 64), self._limit)
            self._words, self._means, self._names = (
                np.concatenate([part, np.zeros((grown - slot, part.shape[1]), dtype=part.dtype)])
                for part in (self._words, self._means, self._names)
            )
        self._words[slot], self._means[slot] = words, mean
        self._names[slot] = np.frombuffer(bytes.fromhex(name), dtype=np.uint8)
        self._count += 1

    @property
    def count(self) -> int:
        """Pictures so far that were like none before."""
        return self._count

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors, for a checkpoint."""
        held = min(self._count, self._limit)
        parts: tuple[np.ndarray[Any, Any], ...] = (
            self._words[:held].view(np.int64),
            self._means[:held],
            self._names[:held],
            np.array([self._count]),
        )
        names = ("words", "means", "names", "count")
        return {name: torch.from_numpy(part.copy()) for name, part in zip(names, parts, strict=True)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        self._words = tensors["words"].numpy().view(np.uint64).reshape(-1, _WORDS).copy()
        self._means, self._names = tensors["means"].numpy().copy(), tensors["names"].numpy().copy()
        self._count = int(tensors["count"])


def near_names(near: NearPictures, names: Sequence[str], pictures: Sequence[Image.Image]) -> list[str]:
    """Of each picture of a prompt the content name of the first that looked like it."""
    return [near.first_like(name, picture) for name, picture in zip(names, pictures, strict=True)]
