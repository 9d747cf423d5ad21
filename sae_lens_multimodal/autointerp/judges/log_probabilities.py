"""How likely each token of a reply was, and what else might have stood there: read from servers, kept in the cache."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_TOP = 20
"""So many of the likeliest tokens OpenAI's API gives at most, and other servers unless they are told otherwise."""

_ROUNDING = 1e-3
"""Above this a number is no logarithm of a probability."""


@dataclass(frozen=True, kw_only=True)
class ReplyToken:
    """One token of a reply."""

    token: str
    """As text, with its blanks: a reply's tokens one after the other spell the reply."""
    log_probability: float
    """Natural logarithm."""
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens at this place and their log-probabilities, the likeliest first."""


def tokens_to_text(tokens: Sequence[ReplyToken]) -> str:
    """Write tokens as one line of JSON."""
    return json.dumps([[one.token, one.log_probability, one.top] for one in tokens])


def tokens_from_text(text: str) -> tuple[ReplyToken, ...]:
    """Read what `tokens_to_text` wrote.

    Example:
        >>> token = ReplyToken(token="yes", log_probability=-0.25, top=(("yes", -0.25), ("no", -1.5)))
        >>> tokens_from_text(tokens_to_text([token])) == (token,)
        True
    """
    return tuple(
        ReplyToken(token=token, log_probability=value, top=tuple((other, one) for other, one in top))
        for token, value, top in json.loads(text)
    )


def tokens_of_choice(choice: object) -> tuple[ReplyToken, ...] | None:
    """Read a completion's choice as an OpenAI-compatible server gives it.

    Args:
        choice: the client checks no types, so any field may be anything.

    Returns:
        None where the server gives none, or something else.
    """
    content = getattr(getattr(choice, "logprobs", None), "content", None)
    if not isinstance(content, list) or not content:
        return None
    found = []
    for entry in content:
        own, top = _token_and_number(entry), getattr(entry, "top_logprobs", None)
        others = [_token_and_number(one) for one in top] if isinstance(top, list) else []
        known = [one for one in others if one is not None]
        if own is None or len(known) < len(others):
            return None
        found.append(
            ReplyToken(token=own[0], log_probability=own[1], top=tuple(sorted(known, key=lambda one: -one[1])))
        )
    return tuple(found)


def _token_and_number(entry: object) -> tuple[str, float] | None:
    token, value = getattr(entry, "token", None), getattr(entry, "logprob", None)
    if not isinstance(token, str) or not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return (token, min(float(value), 0.0)) if math.isfinite(value) and value <= _ROUNDING else None
