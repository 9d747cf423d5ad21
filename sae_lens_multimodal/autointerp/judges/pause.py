"""One pause for all requests to a server that says it has had too many."""

from __future__ import annotations

import threading
import time
from typing import Any

TOO_MANY = 429
LONGEST_SECONDS = 60.0
USUAL_SECONDS = 0.5


class SharedPause:
    """Holds back every new request until the time that a 429 asked for; without it each would earn its own 429.

    The two methods are an HTTP client's hooks, called from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until = 0.0

    def note(self, response: Any) -> None:  # noqa: ANN401 - of whatever HTTP library the client stands on
        """Look whether a response asks for a pause."""
        if response.status_code != TOO_MANY:
            return
        until = time.monotonic() + pause_seconds(response.headers.get("retry-after"))
        with self._lock:
            self._until = max(self._until, until)

    def wait(self, _: object = None) -> None:
        """Wait until the pause is over."""
        while (left := self._left()) > 0:
            time.sleep(left)

    def _left(self) -> float:
        with self._lock:
            return self._until - time.monotonic()


def pause_seconds(retry_after: str | None) -> float:
    """Read a Retry-After in seconds; a date or nothing is half a one, as the client's own backoff goes on from there.

    Example:
        >>> [pause_seconds(value) for value in ("2.5", None, "Wed, 21 Oct 2015 07:28:00 GMT", "900", "-1")]
        [2.5, 0.5, 0.5, 60.0, 0.0]
    """
    try:
        wanted = float(retry_after) if retry_after is not None else USUAL_SECONDS
    except ValueError:
        return USUAL_SECONDS
    return min(wanted, LONGEST_SECONDS) if wanted > 0 else 0.0
