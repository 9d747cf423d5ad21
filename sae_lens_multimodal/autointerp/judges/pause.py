"""When to ask a server again: as its Retry-After says, all requests together, and else after growing pauses."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

FIRST_SECONDS, MOST_SECONDS = 0.5, 8.0
"""Of the pauses that grow by themselves, as the official client has them."""
SHORTENED_AT_MOST = 0.25
"""Share by which such a pause is shortened by chance, so that requests do not come back all at once."""


def asked_seconds(headers: Mapping[str, str], *, now: float) -> float | None:
    """Read how long a response asks to wait (RFC 9110, 10.2.3: a number of seconds, or a date).

    A date counts from the response's own `Date` where it has one: the clocks of two machines differ.

    Args:
        headers: of the response, by lower-case name.
        now: seconds since 1970, for a date in a response that does not say when it was sent.

    Returns:
        None where it does not ask, or in no way that can be read; 0 for a time that is past.

    Example:
        >>> later = "Wed, 21 Oct 2015 07:30:00 GMT"
        >>> asked_seconds({"retry-after": later, "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, now=0.0)
        120.0
        >>> [asked_seconds({"retry-after": one}, now=1445412590.0) for one in ("2.5", later, "-1", "soon")]
        [2.5, 10.0, 0.0, None]
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        seconds = _number(headers.get(name))
        if seconds is not None:
            return max(seconds * unit, 0.0)
    until = _date(headers.get("retry-after"))
    if until is None:
        return None
    sent = _date(headers.get("date"))
    return max(until - (now if sent is None else sent), 0.0)


def _number(text: str | None) -> float | None:
    try:
        found = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return None if math.isnan(found) else found


def _date(text: str | None) -> float | None:
    """Read a date of HTTP as seconds since 1970."""
    try:
        return None if text is None else parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def growing_seconds(n_tries: int) -> float:
    """How long to wait after so many tries where the server does not say: twice as long each time, less a little."""
    whole = min(FIRST_SECONDS * 2.0 ** min(n_tries - 1, 16), MOST_SECONDS)
    return whole * (1 - SHORTENED_AT_MOST * random.random())


class SharedPause:
    """Holds back every request until the time that a busy server asked for; without it each would be turned away once.

    Used on one event loop only.
    """

    def __init__(self) -> None:
        self._until = 0.0

    def extend(self, seconds: float) -> None:
        """Let nobody ask for so long from now on."""
        self._until = max(self._until, time.monotonic() + seconds)

    @property
    def left_seconds(self) -> float:
        """How long it still lasts."""
        return max(self._until - time.monotonic(), 0.0)
