"""Retry-After in both forms, pauses that grow, pauses that are too long, and ^C: a server that is busy or silent."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_multimodal.autointerp.judges import CachedJudge, FailureKind, JudgeFailure, JudgeRequest, OpenAIJudge
from sae_lens_multimodal.autointerp.judges import openai_judge as module
from sae_lens_multimodal.autointerp.judges.background import BackgroundLoop
from sae_lens_multimodal.autointerp.judges.pause import asked_seconds, growing_seconds
from sae_lens_multimodal.errors import ConfigError, JudgeError
from tests.autointerp.server import Answer, Server, completion, error, serving

NUMBERS = [JudgeRequest(parts=(f"number {n}",)) for n in range(24)]


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def judge_at(url: str, **options: Any) -> OpenAIJudge:
    return OpenAIJudge("m", base_url=url, **{"max_retries": 1, "timeout_seconds": 30.0, "give_up_after": 99, **options})


def echo(body: dict[str, Any]) -> Answer:
    return completion(body["messages"][0]["content"][0]["text"])


def busy(status: int, **headers: str) -> Answer:
    return error(status, "slow down")._replace(headers=tuple(headers.items()))


def after(seconds: float, *, clock: float = 0.0) -> dict[str, str]:
    """A Retry-After as a date, by a clock that is wrong by so many seconds, which the server's Date shows."""
    now = datetime.now(UTC) + timedelta(seconds=clock)
    return {
        "Retry-After": format_datetime(now + timedelta(seconds=seconds), usegmt=True),
        "Date": format_datetime(now, usegmt=True),
    }


@given(st.integers(0, 10**6), st.integers(-(10**6), 10**6))
def test_a_date_counts_by_the_clock_of_who_wrote_it(seconds: int, wrong_by: int) -> None:
    headers = {name.lower(): value for name, value in after(seconds, clock=wrong_by).items()}
    assert asked_seconds(headers, now=time.time()) == seconds
    del headers["date"]
    assert asked_seconds(headers, now=time.time()) == pytest.approx(max(seconds + wrong_by, 0), abs=2)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "tomorrow"}, None),
        ({"retry-after": "Wed, 99 Oct 2015 07:28:00 GMT"}, None),
        ({"retry-after": "1e400"}, float("inf")),
        ({"retry-after": "3", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "3", "retry-after-ms": "x"}, 3.0),
        # a server's own date that is no date: by our clock
        ({"retry-after": "Thu, 01 Jan 1970 00:02:00 GMT", "date": "?"}, 120.0),
    ],
)
def test_what_a_response_asks_for_is_read_or_passed_over(headers: dict[str, str], expected: float | None) -> None:
    assert asked_seconds(headers, now=0.0) == expected


def test_pauses_of_its_own_grow_and_differ() -> None:
    for number, whole in enumerate((0.5, 1.0, 2.0, 4.0, 8.0, 8.0), start=1):
        drawn = {growing_seconds(number) for _ in range(20)}
        assert 0.75 * whole <= min(drawn) < max(drawn) <= whole


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("clock", [0.0, -3600.0, 3600.0])
def test_a_date_is_waited_for(status: int, clock: float) -> None:
    """The server's clock may be an hour off."""

    def answer(number: int, body: dict[str, Any], _: Server) -> Answer:
        return busy(status, **after(2, clock=clock)) if number == 0 else echo(body)

    with serving(answer) as server:
        outcomes = judge_at(server.url, concurrency=1).ask_all(NUMBERS[:6], progress=False)
    assert [getattr(one, "text", one) for one in outcomes] == [f"number {n}" for n in range(6)]
    assert all(time - server.times[0] >= 1.9 for time in server.times[1:])


def test_a_storm_is_not_answered_with_a_storm() -> None:
    def storm(_: int, body: dict[str, Any], server: Server) -> Answer:
        return echo(body) if time.monotonic() - server.times[0] > 1.0 else busy(429, **{"Retry-After": "0.6"})

    with serving(storm) as server:
        outcomes = judge_at(server.url, max_retries=5, concurrency=4).ask_all(NUMBERS, progress=False)
    assert [getattr(one, "text", one) for one in outcomes] == [f"number {n}" for n in range(24)]
    early = [at - server.times[0] for at in server.times if at - server.times[0] < 1.0]
    assert len(early) <= 8, "four at once, and the same four once more"


@pytest.mark.parametrize("asked", [{"Retry-After": "121"}, {"Retry-After": "1e400"}, "a date"])
def test_too_long_a_pause_stops_at_once_and_keeps_what_was_answered(asked: Any, tmp_path: Path) -> None:
    """121 seconds is more than the official client itself would wait."""

    def answer(number: int, body: dict[str, Any], server: Server) -> Answer:
        if number < 5:
            return echo(body)
        if number == 5:
            return busy(429, **(after(3600) if asked == "a date" else asked))
        server.released.wait(0.6)
        return echo(body)

    with serving(answer) as server:
        judge = CachedJudge(judge_at(server.url, concurrency=3, longest_pause_seconds=120), tmp_path / "a.sqlite")
        started = time.monotonic()
        with pytest.raises(JudgeError, match=r"asks for a pause of .* seconds, more than longest_pause_seconds=120"):
            judge.ask_all(NUMBERS, progress=False)
        assert time.monotonic() - started < 10
        assert len(judge) == len(server.bodies) - 1, "what was under way is waited for and kept"
        assert len(server.bodies) <= 9, "and nothing new is asked"


def test_a_pause_within_the_limit_is_waited_out_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes, which the official client would not wait."""
    clock = [0.0]

    async def wait(_: Any, seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(module, "_wait", wait)
    monkeypatch.setattr("sae_lens_multimodal.autointerp.judges.pause.time.monotonic", lambda: clock[0])
    with serving(lambda n, body, _: echo(body) if n else busy(429, **{"Retry-After": "600"})) as server:
        outcomes = judge_at(server.url, concurrency=1).ask_all(NUMBERS[:2], progress=False)
    assert [getattr(one, "text", one) for one in outcomes] == ["number 0", "number 1"]
    assert clock[0] == pytest.approx(600)


def test_a_server_that_forbids_another_try_is_not_asked_again() -> None:
    with serving(lambda *_: busy(500, **{"x-should-retry": "false"})) as server:
        found = judge_at(server.url, max_retries=3).ask(NUMBERS[0])
    assert isinstance(found, JudgeFailure) and found.kind is FailureKind.SERVER
    assert len(server.bodies) == 1


def test_a_server_that_drips_is_a_timeout() -> None:
    """Each byte comes in time, the whole never."""
    with serving(lambda _, body, __: echo(body)._replace(seconds_a_byte=0.05)) as server:
        started = time.monotonic()
        found = judge_at(server.url, max_retries=0, timeout_seconds=0.6).ask(NUMBERS[0])
    assert isinstance(found, JudgeFailure) and found.kind is FailureKind.TIMEOUT
    assert time.monotonic() - started < 5


def interrupt_soon(server: Server, n_asked: int) -> threading.Thread:
    """Press ^C once so many requests have reached the server."""

    def press() -> None:
        end = time.monotonic() + 20
        while len(server.bodies) < n_asked and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


@pytest.mark.parametrize("silent", ["hangs", "pauses"])
def test_stopping_is_prompt_and_keeps_what_was_answered(silent: str, tmp_path: Path) -> None:
    def answer(number: int, body: dict[str, Any], server: Server) -> Answer:
        if number < 6:
            return echo(body)
        if silent == "pauses":
            return busy(429, **{"Retry-After": "25"})
        server.released.wait(30)
        return echo(body)

    with serving(answer) as server:
        judge = CachedJudge(judge_at(server.url, concurrency=4), tmp_path / "a.sqlite")
        thread = interrupt_soon(server, 8)
        with pytest.raises(KeyboardInterrupt):
            judge.ask_all(NUMBERS, progress=False)
        stopped = time.monotonic()
        thread.join()
        n_asked = len(server.bodies)
        assert stopped - server.times[-1] < 5, "long before any answer or pause would have come to its end"
        assert len(judge) == 6
        assert judge.ledger.calls == 6
        time.sleep(0.3)
        assert len(server.bodies) == n_asked, "nothing is asked any more"
    with serving(lambda _, body, __: echo(body)) as server:
        inside = judge_at(server.url)
        inside._place = judge.judge._place  # type: ignore[attr-defined]  # the same server, come back
        outcomes = CachedJudge(inside, tmp_path / "a.sqlite").ask_all(NUMBERS, progress=False)
        assert len(server.bodies) == len(NUMBERS) - 6
    assert [getattr(one, "text", one) for one in outcomes] == [f"number {n}" for n in range(24)]


def test_what_came_in_before_the_stop_is_handed_on(tmp_path: Path) -> None:
    """Answers that are there when ^C comes, but were not looked at yet."""
    first_is_taken = threading.Event()

    def answer(number: int, body: dict[str, Any], _: Server) -> Answer:
        assert number == 0 or first_is_taken.wait(20)
        return echo(body)

    with serving(answer) as server:
        judge = CachedJudge(judge_at(server.url, concurrency=6), tmp_path / "a.sqlite")
        stream = judge.stream(NUMBERS[:6])
        next(stream)
        first_is_taken.set()
        time.sleep(1.0)
        taken = 0

        def stop(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        original, module.wait = module.wait, stop
        try:
            with pytest.raises(KeyboardInterrupt):
                for _ in stream:
                    taken += 1
        finally:
            module.wait = original
    assert (taken, len(judge)) == (5, 6)


def test_a_judge_that_is_let_go_leaves_no_thread() -> None:
    with serving(lambda _, body, __: echo(body)) as server:
        judge = judge_at(server.url)
        judge.ask(NUMBERS[0])
        background = judge._background
        assert isinstance(background, BackgroundLoop) and background._thread.is_alive()
        del judge
        background._thread.join(5)
        assert not background._thread.is_alive()
        background.close()


@pytest.mark.parametrize("options", [{"max_retries": -1}, {"longest_pause_seconds": -1.0}, {"give_up_after": 0}])
def test_numbers_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        judge_at("http://127.0.0.1:1/v1", **options)
