"""Threads work ahead in order, pass errors on in their turn, and leave nothing behind."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Iterator

import pytest

from sae_lens_multimodal.data.workers import Aside, ordered_map


def slow_double(number: int) -> int:
    time.sleep(random.Random(number).random() / 200)
    return number * 2


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("under-test")]


def all_end(seconds: float = 10.0) -> bool:
    """Whether the threads end within some time; the source is then let go of by the thread that read it."""
    until = time.monotonic() + seconds
    while ours() and time.monotonic() < until:
        time.sleep(0.01)
    gc.collect()
    return not ours()


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("ahead", [1, 3, 50])
def test_results_are_those_of_map_in_order(workers: int, ahead: int) -> None:
    given = ordered_map(slow_double, iter(range(30)), workers=workers, ahead=ahead)
    assert list(given) == list(map(slow_double, range(30)))
    assert list(ordered_map(slow_double, [], workers=workers, ahead=ahead)) == []


def test_no_more_is_taken_than_was_said() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = ordered_map(slow_double, items(), workers=2, ahead=4, name="under-test")
    assert next(results) == 0
    time.sleep(0.2)
    assert taken == [0, 1, 2, 3, 4], "one was handed out, and four are ahead of it"
    results.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_the_function_and_of_the_items_come_in_their_turn(workers: int) -> None:
    def fails_at_five(number: int) -> int:
        if number == 5:
            raise KeyError("five")
        return slow_double(number)

    def items_until_three() -> Iterator[int]:
        yield from range(3)
        raise OSError("gone")

    got: list[int] = []
    with pytest.raises(KeyError, match="five"):
        got.extend(ordered_map(fails_at_five, range(20), workers=workers, ahead=4))
    results = ordered_map(slow_double, items_until_three(), workers=workers, ahead=10)
    assert [next(results) for _ in range(3)] == [0, 2, 4]
    with pytest.raises(OSError, match="gone"):
        next(results)


@pytest.mark.parametrize("end", ["close", "forget", "exhaust", "fail"])
def test_no_thread_is_left(end: str) -> None:
    closed: list[str] = []

    def items() -> Iterator[int]:
        try:
            yield from range(8)
            if end == "fail":
                raise OSError("gone")
        finally:
            closed.append(threading.current_thread().name)

    results = ordered_map(slow_double, items(), workers=3, ahead=4, name="under-test")
    next(results)
    assert ours()
    if end == "close":
        results.close()
    elif end == "forget":
        results = iter(())
        gc.collect()
    elif end == "exhaust":
        list(results)
    else:
        with pytest.raises(OSError, match="gone"):
            list(results)
    del results
    assert all_end()
    assert len(closed) == 1, "the source is told that it is over"


def test_a_chain_ends_as_one() -> None:
    first = ordered_map(slow_double, range(1000), workers=2, ahead=5, name="under-test-1")
    second = ordered_map(slow_double, first, workers=2, ahead=5, name="under-test-2")
    assert [next(second) for _ in range(4)] == [0, 4, 8, 12]
    second.close()
    del first, second
    assert all_end()


@pytest.mark.parametrize("threaded", [True, False])
def test_tasks_aside_are_done_in_order_until_one_fails(threaded: bool) -> None:
    done: list[int] = []

    def task(number: int) -> None:
        if number == 2:
            raise ValueError("two")
        done.append(number)

    with pytest.raises(ValueError, match="two"), Aside(threaded=threaded) as aside:
        for number in range(5):
            aside.do(task, number)
    assert done == [0, 1]


def test_waiting_tells_of_the_last_task() -> None:
    with pytest.raises(ZeroDivisionError), Aside() as aside:
        aside.do(lambda: 1 // 0)
        aside.wait()
