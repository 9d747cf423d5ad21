"""Stretches of an example's text with the firing tokens marked, with wrong ones marked, or plain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sae_lens_multimodal.features.example import IMAGE_MARK, Example
from sae_lens_multimodal.types import Modality

if TYPE_CHECKING:
    from collections.abc import Callable

PICTURE_WORD = " (picture) "
"""Stands for a picture inside a text: a model would take its own placeholder for a picture to come."""


@dataclass(frozen=True, kw_only=True)
class MarkedText:
    """A stretch of text, token by token."""

    tokens: tuple[str, ...]
    marked: tuple[bool, ...]
    """Of each token, whether it is marked."""
    silent: tuple[bool, ...]
    """Of each token, whether it is text on which the feature does not fire."""

    @property
    def unmarked(self) -> MarkedText:
        """The same stretch without marks."""
        return replace(self, marked=(False,) * len(self.tokens))


def marked_text(example: Example, *, context: int = 12, threshold: float = 0.5) -> MarkedText | None:
    """Take the stretch of text in which the feature fires most, and mark where.

    Args:
        example: one feature on one prompt.
        context: tokens shown on either side.
        threshold: share of the stretch's strongest activation from which on a token is marked.

    Returns:
        None where the feature fires on no text.
    """
    windows = example.text_windows(context)
    if not windows:
        return None
    window = windows[0]
    peak = int(window.activations.argmax())
    start, stop = max(0, peak - context), peak + context + 1
    return _text(example, window.positions[start:stop], window.activations[start:stop], threshold)


def plain_text(example: Example, rng: np.random.Generator, *, context: int = 12) -> MarkedText | None:
    """Take a stretch of text by chance, as long as `marked_text` would take, without marks."""
    modality = example.prompt.modality
    written = np.flatnonzero(modality == Modality.TEXT)
    if not len(written):
        return None
    middle = int(rng.integers(len(written)))
    length = 2 * context + 1
    start = max(0, min(middle - context, len(written) - length))
    positions = written[start : start + length]
    return _text(example, positions, np.zeros(len(positions), dtype=np.float32), 1.0)


def wrongly_marked(text: MarkedText, rng: np.random.Generator, *, markable: Callable[[str], bool]) -> MarkedText | None:
    """Mark, in the same text, a stretch of as many tokens on which the feature is silent.

    Args:
        text: the text with the right marks.
        rng: source of the choice.
        markable: which tokens may be marked.

    Returns:
        None where there is no such stretch.
    """
    length = _longest_run(text.marked)
    allowed = [quiet and markable(token) for quiet, token in zip(text.silent, text.tokens, strict=True)]
    starts = [start for start in range(len(allowed) - length + 1) if all(allowed[start : start + length])]
    if not starts or not length:
        return None
    chosen = starts[int(rng.integers(len(starts)))]
    return replace(text, marked=tuple(chosen <= index < chosen + length for index in range(len(text.tokens))))


def _text(example: Example, positions: np.ndarray, activations: np.ndarray, threshold: float) -> MarkedText:
    """Make the text of some positions; control tokens are left out, a picture becomes a word."""
    modality = example.prompt.modality
    shown = [index for index, position in enumerate(positions) if modality[position] != Modality.SPECIAL]
    is_text = [modality[positions[index]] == Modality.TEXT for index in shown]
    values = activations[shown]
    limit = threshold * float(values.max(initial=0.0))
    tokens = [
        example.tokens[positions[index]] if text else PICTURE_WORD for index, text in zip(shown, is_text, strict=True)
    ]
    return MarkedText(
        tokens=tuple(token.replace(IMAGE_MARK, PICTURE_WORD) for token in tokens),
        marked=tuple(bool(value > 0 and value >= limit) for value in values),
        silent=tuple(bool(value <= 0) and text for value, text in zip(values, is_text, strict=True)),
    )


def _longest_run(flags: tuple[bool, ...]) -> int:
    """Count the longest run of True.

    >>> _longest_run((True, False, True, True))
    2
    """
    longest = current = 0
    for flag in flags:
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return longest
