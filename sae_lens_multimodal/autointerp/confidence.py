"""How sure a judge was of its yes or no, from the log-probabilities of its reply's tokens."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

from sae_lens_multimodal.autointerp.judges.log_probabilities import ReplyToken

_PAIRS = (("yes", "no"), ("true", "false"))
_ANSWER = re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE)
_AROUND = " \t\r\n\"'`*.,:;{}[]()"
_LEAST = 1e-9


def probability_of_yes(tokens: Sequence[ReplyToken] | None) -> float | None:
    """Probability of yes against no at the place where the reply answers.

    At the token with which the answer's word begins, the probabilities of all tokens named there that begin a yes are
    added up, and of all that begin a no (as VQAScore does for pictures and captions, Lin et al. 2024; P(True) of
    Kadavath et al. 2022). A side of which none is named gets no more than is left over.

    Args:
        tokens: of a reply that says yes or no, bare or as the value in a JSON object.

    Returns:
        From 0 to 1; None where the reply has no log-probabilities, or no single place where it answers.

    Example:
        >>> top = (("yes", math.log(0.6)), ("no", math.log(0.2)), ("Yes", math.log(0.1)))
        >>> round(probability_of_yes([ReplyToken(token="yes", log_probability=math.log(0.6), top=top)]), 6)
        0.777778
    """
    if not tokens:
        return None
    text = "".join(one.token for one in tokens)
    answer = _answer_of(text)
    at, start = None, 0
    for one in tokens:
        if answer is not None and start <= answer.start() < start + len(one.token):
            at = one
        start += len(one.token)
    if at is None or answer is None:
        return None
    known = {at.token: math.exp(at.log_probability)} | {token: math.exp(value) for token, value in at.top}
    pair = next(pair for pair in _PAIRS if answer.group().casefold() in pair)
    # a tokenizer that spells the answer in pieces has only the beginnings of the other, too
    whole = _bare(at.token) in pair
    sides = {word: sum(value for token, value in known.items() if _begins(token, word, whole=whole)) for word in pair}
    left_over = max(1.0 - sum(known.values()), _LEAST)
    unnamed = left_over if len(known) == 1 else max(min(left_over, *known.values()), _LEAST)
    yes, no = (sides[word] or unnamed for word in pair)
    return yes / (yes + no)


def _answer_of(text: str) -> re.Match[str] | None:
    """Find the one word that answers; in a JSON object, if there is one."""
    start, end = text.find("{"), len(text)
    if start >= 0:
        try:
            _, end = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError:
            return None
    found = list(_ANSWER.finditer(text, max(start, 0), end))
    return found[0] if len(found) == 1 else None


def _bare(token: str) -> str:
    return token.strip(_AROUND).casefold()


def _begins(token: str, word: str, *, whole: bool) -> bool:
    """Tell whether a token begins a word.

    >>> [_begins(token, "no", whole=True) for token in (' "No', "no.", "n", "not")], _begins("n", "no", whole=False)
    ([True, True, False, False], True)
    """
    letters = _bare(token)
    return re.match(rf"{word}\b", letters) is not None or (not whole and bool(letters) and word.startswith(letters))
