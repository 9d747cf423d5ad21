"""From a row of tokens to what a reader sees: text with levels, one chip for each picture, long silence left out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_lens_multimodal.report.formats import visible
from sae_lens_multimodal.report.view import SpanView, TokenView
from sae_lens_multimodal.types import Modality

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

MAX_TOKENS = 120
"""Tokens of text shown around the largest activation."""


def token_views(
    tokens: Sequence[str],
    image_values: Float[np.ndarray, " seq"],
    text_values: Float[np.ndarray, " seq"],
    modality: Int[np.ndarray, " seq"],
    image_index: Int[np.ndarray, " seq"],
    *,
    image_scale: float,
    text_scale: float,
    max_tokens: int = MAX_TOKENS,
) -> tuple[TokenView, ...]:
    """Make a prompt readable.

    Args:
        tokens: what each token says.
        image_values: activation at each image token, 0 elsewhere.
        text_values: activation at each token of text, 0 elsewhere.
        modality: values of Modality.
        image_index: the picture each token belongs to, -1 where none.
        image_scale: the activation on image tokens that counts as level 1.
        text_scale: the same for text.
        max_tokens: longer prompts are cut around the strongest token of text.

    Returns:
        Tokens in order; all of one picture's are one entry, padding is left out.
    """
    modality = np.asarray(modality)
    found = entries(modality, image_index, image_values, text_values)
    kept = _window(found.in_picture, found.values, max_tokens)
    views: list[TokenView] = []
    for entry, place in enumerate(found.places):
        value = float(found.values[entry])
        if found.in_picture[entry]:
            name = f"picture {max(int(found.picture[entry]), 0) + 1}"
            views.append(_token(name, "picture", value, image_scale))
        elif kept[entry]:
            kind = "special" if modality[place] == int(Modality.SPECIAL) else "text"
            views.append(_token(visible(tokens[place]), kind, value, text_scale))
        elif not views or views[-1].kind != "gap":
            views.append(TokenView(text="…", kind="gap", value=0.0, level=0.0))
    return tuple(views)


class Entries(NamedTuple):
    """A prompt as a reader takes it: tokens, and pictures as one each."""

    places: Int[np.ndarray, " entries"]
    """The first token of each."""
    in_picture: Bool[np.ndarray, " entries"]
    picture: Int[np.ndarray, " entries"]
    """Which picture of the prompt; of no meaning for others."""
    values: Float[np.ndarray, " entries"]
    """Activation; the largest one of a picture's tokens."""


def entries(
    modality: Int[np.ndarray, " seq"],
    image_index: Int[np.ndarray, " seq"],
    image_values: Float[np.ndarray, " seq"],
    text_values: Float[np.ndarray, " seq"],
) -> Entries:
    """Take all tokens of one picture together; padding is left out.

    A newline token without a picture of its own belongs to the picture before it.

    Args:
        modality: values of Modality.
        image_index: the picture each token belongs to, -1 where none.
        image_values: activation at each image token, 0 elsewhere.
        text_values: activation at each token of text, 0 elsewhere.
    """
    modality, image_index = np.asarray(modality), np.asarray(image_index)
    places = np.flatnonzero(modality != int(Modality.PADDING))
    if not len(places):
        return Entries(places, np.zeros(0, dtype=bool), places, np.zeros(0))
    pictured = np.isin(modality[places], (int(Modality.IMAGE), int(Modality.NEWLINE)))
    fresh = pictured & ~np.concatenate([[False], pictured[:-1]])
    known = pictured & ((image_index[places] != -1) | fresh)
    last = np.maximum.accumulate(np.where(known, np.arange(len(places)), 0))
    picture = image_index[places][last]
    changed = np.concatenate([[True], picture[1:] != picture[:-1]])
    starts = np.flatnonzero(~pictured | fresh | changed)
    lit = np.where(pictured, np.asarray(image_values)[places], np.asarray(text_values)[places])
    return Entries(places[starts], pictured[starts], picture[starts], np.maximum.reduceat(lit, starts))


def with_blanks(tokens: Sequence[str], is_text: Bool[np.ndarray, " seq"], said: str) -> list[str]:
    """Put a blank before each token of text, for tokenizers whose tokens hold none though the text has them.

    Args:
        tokens: what each token says.
        is_text: which of them are text.
        said: the text that they were made from.

    Example:
        >>> with_blanks(["<s>", "a", "dot"], np.array([False, True, True]), "user: a dot")
        ['<s>', ' a', ' dot']
        >>> with_blanks(["a", " dot"], np.array([True, True]), "a dot")
        ['a', ' dot']
    """
    words = [token for token, inside in zip(tokens, is_text, strict=True) if inside]
    if any(word[:1].isspace() or word[-1:].isspace() for word in words):
        return list(tokens)
    if not any(f"{word} {following}" in said for word, following in pairwise(words)):
        return list(tokens)
    return [f" {token}" if inside else token for token, inside in zip(tokens, is_text, strict=True)]


def snippet(views: Sequence[TokenView], *, reach: int = 6) -> tuple[str, str, str]:
    """Return the strongest token of text, with what stands before and after it.

    Example:
        >>> words = [TokenView(text=t, kind="text", value=v, level=v) for t, v in ((" a", 0), (" red", 1), (" dot", 0))]
        >>> snippet(words)
        (' a ', 'red', ' dot')
    """
    places = [place for place, view in enumerate(views) if view.kind == "text"]
    if not places:
        return ("", "", "")
    best = max(places, key=lambda place: views[place].value)
    before = "".join(views[place].text for place in places if best - reach <= place < best)
    after = "".join(views[place].text for place in places if best < place <= best + reach)
    token = views[best].text.lstrip() or views[best].text
    return (before + views[best].text[: -len(token)], token, after)


def changes(before: str, after: str) -> tuple[tuple[SpanView, ...], tuple[SpanView, ...]]:
    """Mark the words that differ between two answers.

    Example:
        >>> changes("a red dot", "a blue dot")[1]
        (SpanView(text='a ', changed=False), SpanView(text='blue', changed=True), SpanView(text=' dot', changed=False))
    """
    old, new = re.findall(r"\s+|\S+", before), re.findall(r"\s+|\S+", after)
    left: list[SpanView] = []
    right: list[SpanView] = []
    for what, a0, a1, b0, b1 in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if a1 > a0:
            left.append(SpanView(text="".join(old[a0:a1]), changed=what != "equal"))
        if b1 > b0:
            right.append(SpanView(text="".join(new[b0:b1]), changed=what != "equal"))
    return tuple(left), tuple(right)


def _token(text: str, kind: str, value: float, scale: float) -> TokenView:
    level = min(1.0, max(0.0, value / scale)) if scale > 0 else 0.0
    return TokenView(text=text, kind=kind, value=value, level=level)  # type: ignore[arg-type]


def _window(
    in_picture: Bool[np.ndarray, " entries"], values: Float[np.ndarray, " entries"], size: int
) -> Bool[np.ndarray, " entries"]:
    """Keep `size` entries around the strongest token of text."""
    texts = np.flatnonzero(~in_picture)
    kept = ~in_picture
    if len(texts) > size:
        best = int(values[texts].argmax())
        start = min(max(0, best - size // 2), len(texts) - size)
        kept[texts[:start]] = kept[texts[start + size :]] = False
    return kept
