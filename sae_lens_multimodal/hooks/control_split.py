"""Holding out prompts so that no picture is on both sides."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sae_lens_multimodal.adapters.prompts import parse_conversation
from sae_lens_multimodal.types import Conversation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Division:
    """Which prompts the search sees, and which are held out."""

    held: list[list[bool]]
    """For each list and prompt whether it is held out."""
    groups: list[list[int]]
    """For each list and prompt the number of its group: prompts that a chain of shared pictures links."""
    left_out: list[bool]
    """For each of the positives whether it shows what a held-out prompt shows, so that the search must not see it."""
    pictures_shared: bool
    """Whether some picture is on both sides, as a list could not be divided otherwise."""


def shown(conversation: Conversation) -> frozenset[str]:
    """Name each picture of a conversation by its pixels as the model sees them; without pictures, the words.

    Raises:
        PromptError, ImageError: as `model.encode`.
    """
    prompt = parse_conversation(conversation)
    if not prompt.images:
        return frozenset([_digest(repr(prompt.messages).encode())])
    return frozenset(_digest(repr((one.mode, one.size)).encode() + one.tobytes()) for one in prompt.images)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def linked(names: Sequence[frozenset[str]]) -> list[int]:
    """Number sets of names, alike where a chain of shared names links them.

    >>> linked([frozenset("ab"), frozenset("c"), frozenset("bd"), frozenset("d")])
    [0, 1, 0, 0]
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for some in names:
        for name in some:
            parent[root(name)] = root(min(some))
    numbers = {one: number for number, one in enumerate(sorted({root(min(some)) for some in names}))}
    return [numbers[root(min(some))] for some in names]


def divide(
    lists: Sequence[Sequence[Conversation]], share: float, seed: int, *, positives: Sequence[Conversation] = ()
) -> Division:
    """Choose the prompts that are held out: prompts that pictures link stay together, over all lists.

    Prompts are linked by every single picture that they share, and by a chain of such prompts; the positives link,
    too. Prompts without a picture are linked where they say the same. A list whose prompts are all linked, so that
    nothing of it could be held out (or searched), is divided all the same, which is logged and said in the result.

    Args:
        lists: the prompts of each sort.
        share: of each list that is held out, about.
        seed: from which the choice follows.
        positives: prompts that are not divided, but left out where they show what is held out.

    Returns:
        The division. Lists of two prompts and more have some on both sides.

    Raises:
        PromptError, ImageError: as `model.encode`.
    """
    names = [[shown(one) for one in some] for some in (*lists, positives)]
    numbers = iter(linked([one for some in names for one in some]))
    groups = [[next(numbers) for _ in some] for some in names][:-1]
    wanted = [min(max(round(len(some) * share), 1), max(len(some) - 1, 0)) for some in groups]
    chosen = _chosen(groups, wanted, np.random.default_rng(seed))
    held = [_checked([one in chosen for one in some], want) for some, want in zip(groups, wanted, strict=True)]
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    for some, flags in zip(names[:-1], held, strict=True):
        for one, flag in zip(some, flags, strict=True):
            seen[flag] |= one
    left_out = [not seen[True].isdisjoint(one) for one in names[-1]]
    if any(left_out):
        logger.info("%d of %d positives show what is held out, and are left out", sum(left_out), len(left_out))
    shared = not seen[True].isdisjoint(seen[False])
    return Division(held=held, groups=groups, left_out=left_out, pictures_shared=shared)


def _chosen(groups: Sequence[Sequence[int]], wanted: Sequence[int], rng: np.random.Generator) -> set[int]:
    """Take groups in random order, as long as a list lacks prompts and every list keeps some."""
    known = sorted({one for some in groups for one in some})
    chosen: set[int] = set()
    for place in rng.permutation(len(known)).argsort().tolist():
        group = known[place]
        counts = [sum(one in chosen for one in some) for some in groups]
        adds = [some.count(group) for some in groups]
        rest = [len(some) - count - add for some, count, add in zip(groups, counts, adds, strict=True)]
        lacks = any(add and count < want for add, count, want in zip(adds, counts, wanted, strict=True))
        if lacks and all(left > 0 or not add for left, add in zip(rest, adds, strict=True)):
            chosen.add(group)
    return chosen


def _checked(held: list[bool], wanted: int) -> list[bool]:
    """Divide a list by prompts where it could not be divided by pictures."""
    if any(held) or not wanted:
        return held
    logger.warning(
        "%d prompts of a list are linked by the pictures they share, so pictures of those held out are seen by the "
        "search, too; give more pictures",
        len(held),
    )
    return [index >= len(held) - wanted for index in range(len(held))]
