"""Holding out prompts so that no picture is on both sides."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sae_lens_multimodal.types import Conversation

logger = logging.getLogger(__name__)


def picture_key(conversation: Conversation) -> tuple[str, ...]:
    """Name the pictures of a conversation by their content, or by where they come from; empty where there is none."""
    parts = [part for message in conversation if not isinstance(message["content"], str) for part in message["content"]]
    given = [part.get("image", part.get("url", part.get("path"))) for part in parts if part.get("type") == "image"]
    return tuple(_name_of(picture) for picture in given)


def _name_of(picture: object) -> str:
    if isinstance(picture, Image.Image):
        return hashlib.sha256(repr((picture.mode, picture.size)).encode() + picture.tobytes()).hexdigest()
    return hashlib.sha256(repr(picture).encode()).hexdigest()


def held_out_prompts(lists: Sequence[Sequence[Conversation]], share: float, seed: int) -> list[list[bool]]:
    """Choose the prompts that are held out: prompts that show the same pictures stay together, over all lists.

    Prompts without a picture stand for themselves. Where one picture is in so many prompts that nothing else could be
    held out (or searched) of a list, its prompts are divided all the same, and that is logged.

    Args:
        lists: the prompts of each sort.
        share: of each list that is held out, about.
        seed: from which the choice follows.

    Returns:
        For each list and prompt whether it is held out. Lists of two prompts and more have some on both sides.
    """
    rng = np.random.default_rng(seed)
    keys = [[picture_key(one) or (f"{n}.{k}",) for k, one in enumerate(prompts)] for n, prompts in enumerate(lists)]
    groups = sorted({key for some in keys for key in some})
    place = dict(zip(groups, rng.permutation(len(groups)).tolist(), strict=True))
    wanted = [min(max(round(len(some) * share), 1), max(len(some) - 1, 0)) for some in keys]
    chosen: set[tuple[str, ...]] = set()
    for group in sorted(groups, key=place.__getitem__):
        counts = [sum(key in chosen for key in some) for some in keys]
        adds = [some.count(group) for some in keys]
        rest = [len(some) - count - add for some, count, add in zip(keys, counts, adds, strict=True)]
        lacks = any(add and count < want for add, count, want in zip(adds, counts, wanted, strict=True))
        if lacks and all(left > 0 or not add for left, add in zip(rest, adds, strict=True)):
            chosen.add(group)
    return [_checked([key in chosen for key in some], want) for some, want in zip(keys, wanted, strict=True)]


def _checked(held: list[bool], wanted: int) -> list[bool]:
    """Divide a list by prompts where it could not be divided by pictures."""
    if any(held) or not wanted:
        return held
    logger.warning("%d prompts show one picture, so those held out show it, too; give more pictures", len(held))
    return [index >= len(held) - wanted for index in range(len(held))]
