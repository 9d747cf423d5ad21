"""What a scorer is: it makes questions with known answers out of examples that the explainer never saw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sae_lens_multimodal.types import Box

if TYPE_CHECKING:
    from PIL import Image

    from sae_lens_multimodal.autointerp.judges.base import JudgeRequest
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.selection import HeldOut
    from sae_lens_multimodal.autointerp.styles import RegionStyle


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to be judged, and what is true of it."""

    truth: bool
    """The right answer: does the feature fire there?"""
    prompt_id: int
    kind: str
    """Of which list the example is: top, ordinary or silent."""
    image_ids: tuple[str, ...]
    """Content names of the prompt's pictures."""
    image: int | None = None
    """Which picture of the prompt is shown."""
    box: Box | None = None
    """Which part of it, in pixels; None for all of it."""
    style: RegionStyle | None = None
    """How that part is shown; None for all of it."""
    text: str | None = None
    """Which text, with its marks."""
    quantile: float | None = None
    """Of an ordinary example: about which share of the prompts in which the feature fires it fires more weakly in."""
    views: tuple[Image.Image, ...] = field(default=(), repr=False, compare=False)
    """What the judge sees."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How many items to make, and how regions and texts are cut."""

    n_positive: int = 5
    n_negative: int = 5
    threshold: float = 0.5
    """Share of an example's strongest activation from which on a token belongs to a region or is marked."""
    context: int = 12
    """Tokens of text shown on either side."""


class Scorer(ABC):
    """Makes items from held-out examples, and asks about them with the words of a prompt book."""

    name: ClassVar[str]
    both_lists: ClassVar[bool] = False
    """Whether it takes firing examples of both modalities' lists."""

    @abstractmethod
    def items(self, examples: HeldOut, book: PromptBook, sampling: Sampling, rng: np.random.Generator) -> list[Item]:
        """Make the items of one feature, in random order; they do not depend on the explanation."""

    @abstractmethod
    def request(self, book: PromptBook, explanation: str, item: Item) -> JudgeRequest | None:
        """Ask about one item; None where the book has no words for it."""


def shuffled(items: list[Item], rng: np.random.Generator) -> list[Item]:
    """Put items into random order, so that no place in the list tells the answer."""
    return [items[index] for index in rng.permutation(len(items))]
