"""Words in text of any script: where a word stands as a whole, and what counts as a word at all."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_UNSPACED = ("CJK ", "HIRAGANA", "KATAKANA", "THAI ", "LAO ", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE")
"""Beginnings of the names of letters of scripts that put no blanks between words."""
_JOINERS = "'\u2019-\u00b7"
_NEGATION = re.compile(r"['\u2019]t(?!\w)", re.IGNORECASE)
"""What makes "can" and "don" parts of "can't" and "don't"; after other apostrophes, as in "cat's", a word is whole."""
_WITHIN = re.compile(r"\w['\u2019]$")
_CLITIC = re.compile(r"t|s|d|m|ll|re|ve", re.IGNORECASE)
"""What stands behind an apostrophe and is no word by itself; "eau" in "l'eau" is one."""


def is_word_character(character: str) -> bool:
    r"""Whether a character is part of words: letters, digits, `_`, and the marks that sit on letters.

    >>> [is_word_character(one) for one in ("a", "é", "\u0301", "7", "-", " ")]
    [True, True, True, True, False, False]
    """
    return character in "_\u200c\u200d" or unicodedata.category(character)[0] in "LMN"


@lru_cache(maxsize=4096)
def is_unspaced(character: str) -> bool:
    """Whether a letter is of a script that puts no blanks between words.

    >>> is_unspaced("猫"), is_unspaced("c")
    (True, False)
    """
    return unicodedata.name(character, "").startswith(_UNSPACED)


def find_words(text: str, word: str, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
    """Find where a word or phrase stands as a whole, upper and lower case alike; blanks within it may be any.

    In scripts without blanks between words every occurrence counts, as nothing in the text says where words end. What
    is written together with a word, such as Korean particles, belongs to it.

    Args:
        text: the text.
        word: a word or phrase.
        start: where to begin.
        stop: where to end; None for the text's end.

    Returns:
        First character and one beyond the last, of every occurrence.

    Example:
        >>> find_words("Training a train, or a Train's engine", "train")
        [(11, 16), (23, 28)]
        >>> find_words("一只猫在这里", "猫")
        [(2, 3)]
        >>> find_words("It can't, but it can", "can")
        [(17, 20)]
    """
    stop = len(text) if stop is None else stop
    found = []
    for match in _pattern(word).finditer(text, start, stop):
        first, end = match.span()
        before, after = text[max(start, first - 2) : first], text[end : min(stop, end + 3)]
        if (
            _breaks(before[-1:], text[first])
            and _breaks(after[:1], text[end - 1])
            and not (_NEGATION.match(after) and text[end - 1].casefold() == "n")
            and not (_WITHIN.search(before) and _CLITIC.fullmatch(text[first:end]))
        ):
            found.append((first, end))
    return found


def _breaks(outside: str, inside: str) -> bool:
    """Whether a word may end between two neighbouring characters."""
    if not outside or not is_word_character(outside):
        return True
    if unicodedata.category(outside)[0] == "M":
        return False
    return is_unspaced(outside) or is_unspaced(inside) or not is_word_character(inside)


@lru_cache(maxsize=256)
def _pattern(word: str) -> re.Pattern[str]:
    parts = word.split()
    # Text may have letters with their marks composed or apart.
    forms = dict.fromkeys(
        r"\s+".join(re.escape(unicodedata.normalize(form, part)) for part in parts) for form in ("NFC", "NFD")
    )
    return re.compile("|".join([r"\s+".join(map(re.escape, parts)), *forms]), re.IGNORECASE)


def is_word(text: str, min_letters: int = 2) -> bool:
    r"""Whether a text is one word: letters of any script with their marks; apostrophes and hyphens within.

    A single ideograph is a word.

    >>> [is_word(one) for one in ("café", "don't", "猫", "x", "a1", "##ing", "\ufffd", "кот")]
    [True, True, True, False, False, False, False, True]
    """
    if not text or unicodedata.category(text[0])[0] != "L" or text[-1] in _JOINERS:
        return False
    if not all(unicodedata.category(one)[0] in "LM" or one in _JOINERS for one in text):
        return False
    letters = [one for one in text if unicodedata.category(one)[0] == "L"]
    return len(letters) >= min_letters or is_unspaced(letters[0])
