"""Texts that say the same, word for word or nearly, so that nothing is scored on what an explainer has read."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import TypeAlias

from sae_lens_multimodal.errors import SelectionError

Words: TypeAlias = tuple[str, ...]

SHINGLE = 5
"""Words in a row that are compared; texts with fewer words are the same if they are equal."""
MOST_SHARED = 0.5
"""Share of the shorter text's shingles that another may hold."""


def words_of(text: str) -> Words:
    """Take the words of a text, without case, punctuation, blanks, and marks, wherever these stand.

    Example:
        >>> words_of(" A  un<<happy>> dog, "), words_of("[ red ] Circle .")
        (('a', 'unhappy', 'dog'), ('red', 'circle'))
    """
    pieces = unicodedata.normalize("NFKC", text).casefold().split()
    bare = ("".join(character for character in piece if character.isalnum()) for piece in pieces)
    return tuple(word for word in bare if word)


def say_the_same(first: Words, second: Words) -> bool:
    """Tell whether two texts are equal, or at least half of one is in the other.

    The containment of word shingles (Broder 1997): of runs of `SHINGLE` words of the text with fewer of them, the share
    that the other one has, too. A stretch of text around a firing token has about as many tokens before as after it,
    so that what all prompts of a template begin with does not make two of them the same.

    Example:
        >>> say_the_same(words_of("a red circle."), words_of("A [red] circle"))
        True
        >>> say_the_same(words_of("a red circle"), words_of("there is a red circle on the left"))
        False
        >>> say_the_same(words_of("the dog sat on the mat today"), words_of("yesterday the dog sat on the mat"))
        True
    """
    if first == second:
        return True
    few, many = sorted((_shingles(first), _shingles(second)), key=len)
    return bool(few) and len(few & many) >= MOST_SHARED * len(few)


def _shingles(words: Words) -> frozenset[Words]:
    return frozenset(words[start : start + SHINGLE] for start in range(len(words) - SHINGLE + 1))


class ReadTexts:
    """Texts that were read, to tell whether another one says the same as any of them.

    Args:
        texts: as they were shown, with marks or without.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._read: dict[Words, None] = {}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Count a text as read."""
        self._read[words_of(text)] = None

    def has(self, text: str) -> bool:
        """Tell whether a text says the same as one that was read; one without words says nothing."""
        words = words_of(text)
        return bool(words) and (words in self._read or any(say_the_same(words, one) for one in self._read))

    def take(self, *texts: str) -> bool:
        """Count texts as read unless any of them says the same as one that was read; tell whether they were new.

        Several texts of one item, such as the same words with right and wrong marks, may say the same.
        """
        if any(self.has(text) for text in texts):
            return False
        for text in texts:
            self.add(text)
        return True


def check_unread(feature: int, items: Iterable[tuple[int, str]], *, read: Iterable[str]) -> None:
    """Check that no text to score with says what the explainer has read, or what another prompt's text says.

    Args:
        feature: which feature is scored.
        items: prompt id and text of each item.
        read: texts that the explainer saw, or that the choice among explanations was made on.

    Raises:
        SelectionError: one does.
    """
    seen = [words_of(text) for text in read]
    others: dict[Words, int] = {}
    for prompt_id, text in items:
        words = words_of(text)
        if words and any(say_the_same(words, one) for one in seen):
            raise SelectionError(
                f"feature {feature} would be scored on {text!r} of prompt {prompt_id}, but the explainer saw that or "
                "nearly that; scores need texts that it never read."
            )
        twin = next((one for one, owner in others.items() if owner != prompt_id and say_the_same(words, one)), None)
        if words and twin is not None:
            raise SelectionError(
                f"feature {feature} would be scored on {text!r} of prompt {prompt_id} and on nearly the same of prompt "
                f"{others[twin]}; each text counts once."
            )
        others.setdefault(words, prompt_id)
