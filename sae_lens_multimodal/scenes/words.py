"""The attributes of the world and the words that name them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

COLOURS: tuple[str, ...] = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")
TEXTURES: tuple[str, ...] = ("solid", "striped")
GLYPHS: tuple[str, ...] = ("e", "h", "l", "o", "t", "v", "x", "z")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "texture": TEXTURES,
    "glyph": GLYPHS,
}
"""Every kind of attribute and its values."""

PHRASE_ORDER: tuple[str, ...] = ("colour", "texture", "shape", "glyph")
"""The order in which attributes are spoken: "red striped circle letter x"."""

HELD_OUT: frozenset[tuple[str, str, str]] = frozenset(
    {
        ("red", "striped", "star"),
        ("green", "solid", "cross"),
        ("blue", "striped", "triangle"),
        ("yellow", "solid", "circle"),
    }
)
"""Combinations (colour, texture, shape) that the tiny model never saw in training."""

_KIND_OF: Mapping[str, tuple[str, str]] = MappingProxyType(
    {value: (kind, value) for kind, values in ATTRIBUTES.items() for value in values}
)


def attribute_of(word: str) -> tuple[str, str] | None:
    """Tell which attribute a word of the text names.

    Args:
        word: one word; case and surrounding blanks do not matter.

    Returns:
        Its kind and value, or None for a word that names none.

    Example:
        >>> attribute_of("Red"), attribute_of("is")
        (('colour', 'red'), None)
    """
    return _KIND_OF.get(word.strip().lower())


def phrase_of(attributes: Mapping[str, str]) -> str:
    """Spell attributes in the canonical order; "nothing" where there are none.

    Example:
        >>> phrase_of({"shape": "circle", "colour": "red"})
        'red circle'
        >>> phrase_of({"glyph": "x"}), phrase_of({})
        ('letter x', 'nothing')
    """
    words: list[str] = []
    for kind in PHRASE_ORDER:
        if kind in attributes:
            words += ["letter", attributes[kind]] if kind == "glyph" else [attributes[kind]]
    return " ".join(words) if words else "nothing"


def with_article(phrase: str) -> str:
    """Put "a" before a phrase that names a shape.

    Example:
        >>> with_article("red circle"), with_article("red")
        ('a red circle', 'red')
    """
    return f"a {phrase}" if any(word in SHAPES for word in phrase.split()) else phrase
