"""An event loop in a thread of its own: what runs there can be waited for, and stopped, from anywhere."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

_CLOSE_SECONDS = 5.0


class BackgroundLoop:
    """Runs coroutines; a notebook's own loop is not touched.

    Args:
        at_close: run on the loop when it is closed, to give back what was used there.
    """

    def __init__(self, at_close: Callable[[], Awaitable[None]]) -> None:
        self._at_close = at_close
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name="judge", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin with something; cancelling the future stops it where it waits."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function: Callable[[], object]) -> None:
        """Call a function on the loop as soon as it gets to it."""
        self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Stop what still runs, and end the thread."""
        if self._loop.is_closed():
            return
        ending = self.start(self._end())
        if threading.current_thread() is not self._thread:
            with suppress(TimeoutError):
                ending.result(_CLOSE_SECONDS)
            self._thread.join(_CLOSE_SECONDS)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._at_close()
        self._loop.call_soon(self._loop.stop)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
