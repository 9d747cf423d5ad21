"""Work in threads beside the caller, in order: ahead of who uses it, or after who gave it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar, cast

In = TypeVar("In")
Out = TypeVar("Out")

_END: Any = object()


def ordered_map(
    function: Callable[[In], Out], items: Iterable[In], *, workers: int, ahead: int, name: str = "data"
) -> Generator[Out, None, None]:
    """Give what `map(function, items)` gives, worked out by threads while the consumer does something else.

    One thread reads `items`, so they need not be thread-safe; `workers` threads apply the function. Results come in
    the order of the items however long each takes; an exception of the items or of the function is raised when it is
    the turn of its result, after all results before it. When the iterator is closed or garbage-collected, what waits is
    cancelled, and the threads end with what they are at; nobody waits for them, as the collector may come by inside a
    thread that is just being started, which others cannot join.

    Args:
        function: What to do with each item; called from several threads at once.
        items: The items.
        workers: Threads that apply the function; 0 to do everything in the caller's thread when it is asked for.
        ahead: How many items are taken before their results are asked for, at most.
        name: The beginning of the threads' names.

    Example:
        >>> list(ordered_map(lambda number: number * 2, range(5), workers=2, ahead=3))
        [0, 2, 4, 6, 8]
    """
    if workers == 0:
        yield from map(function, items)
        return
    source = iter(items)
    reader = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-read")
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    waiting: deque[Future[Out]] = deque()

    def submit() -> None:
        # Reading is a task too: its exception then waits for its turn.
        waiting.append(pool.submit(_apply, function, reader.submit(next, source, _END)))

    try:
        for _ in range(max(ahead, 1)):
            submit()
        while (result := waiting.popleft().result()) is not _END:
            submit()
            yield result
    finally:
        for executor in (reader, pool):
            executor.shutdown(wait=False, cancel_futures=True)


def _apply(function: Callable[[In], Out], item: Future[In]) -> Out:
    value: Any = item.result()
    return cast("Out", _END) if value is _END else function(value)


class Aside:
    """Does one task after the other in a thread beside the caller, who is at most one task ahead.

    An exception of a task is raised when the next is given, or by `wait`; what comes after it is not begun.

    Args:
        threaded: Whether there is a thread; otherwise each task is done when it is given.

    Example:
        >>> done = []
        >>> with Aside() as aside:
        ...     for number in range(3):
        ...         aside.do(done.append, number)
        ...     aside.wait()
        >>> done
        [0, 1, 2]
    """

    def __init__(self, *, threaded: bool = True) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="aside") if threaded else None
        self._last: Future[Any] | None = None

    def do(self, task: Callable[..., object], *arguments: object) -> None:
        """Give a task, once the one before it is done."""
        self.wait()
        if self._pool is None:
            task(*arguments)
        else:
            self._last = self._pool.submit(task, *arguments)

    def wait(self) -> None:
        """Return when everything is done that was given."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)
