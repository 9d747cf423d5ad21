"""The few types that every layer shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""One chat message as transformers spells it: `{"role": ..., "content": str | list of parts}`."""

Conversation: TypeAlias = Sequence[Message]
"""The messages of one prompt, in order."""


class Modality(IntEnum):
    """What a position of the token sequence is."""

    TEXT = 0
    """A token of ordinary text."""
    IMAGE = 1
    """A patch of a picture: it has a box in the original image."""
    NEWLINE = 2
    """A learned separator between rows of patches: it belongs to a picture but to no place in it."""
    SPECIAL = 3
    """A control token: beginning, end, role marks."""
    PADDING = 4
    """Filler; attention is masked there."""


class Box(NamedTuple):
    """A rectangle in pixels of the original image; `x1` and `y1` lie just outside of it."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        """Width in pixels."""
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        """Height in pixels."""
        return self.y1 - self.y0

    @property
    def area(self) -> float:
        """Area in square pixels."""
        return self.width * self.height
