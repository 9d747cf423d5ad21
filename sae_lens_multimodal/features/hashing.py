"""Names and seeded priorities that depend on content alone, so that a resumed pass draws as an unbroken one does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

_MASK = (1 << 63) - 1
_GOLDEN = -7046029254386353131
_MIX_A = -4658895280553007687
_MIX_B = -7723592293110705685


def image_id(image: Image.Image) -> str:
    """Name of a picture by what it shows: a digest of its size and RGB pixels (32 hexadecimal digits)."""
    picture = image if image.mode == "RGB" else image.convert("RGB")
    digest = hashlib.blake2b(f"{picture.width}x{picture.height}".encode(), digest_size=16)
    digest.update(picture.tobytes())
    return digest.hexdigest()


def picture_key(image_ids: Iterable[str], tokens: Sequence[int] | Sequence[str] = ()) -> int:
    """Key of a prompt by the set of its pictures, or by its tokens where it has none; at least 0.

    Two prompts with one key show the same thing, so a feature's list of examples holds at most one of them.
    """
    names = sorted(set(image_ids)) or [str(token) for token in tokens]
    digest = hashlib.blake2b(" ".join(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _MASK


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def priorities(seed: int, keys: Int64[Tensor, "n"], features: Int64[Tensor, "m"]) -> Int64[Tensor, "n m"]:
    """A random-looking number for every key and feature, at least 0 and the same in every run (SplitMix64).

    Whoever keeps the k smallest priorities of a stream keeps a uniform sample of its distinct keys, without any
    generator state (bottom-k sampling; Cohen and Kaplan 2007).
    """
    return priorities_of(seed, keys[:, None], features[None, :])


def priorities_of(seed: int, keys: Int64[Tensor, "*#n"], features: Int64[Tensor, "*#n"]) -> Int64[Tensor, "*n"]:
    """The same, of keys and features side by side."""
    return _mix(keys * _GOLDEN + _mix(features * 2 + 1 + (seed << 20))) & _MASK


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _MIX_A
    x = (x ^ _shifted(x, 27)) * _MIX_B
    return x ^ _shifted(x, 31)


def sae_fingerprint(tensors: Sequence[tuple[str, Tensor]], *, sample: int = 65_536) -> str:
    """A short digest of a model's parameters: their names, shapes and an even sample of their values."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // sample)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat[::step].to(device="cpu", dtype=torch.float32).numpy().tobytes())
    return digest.hexdigest()
