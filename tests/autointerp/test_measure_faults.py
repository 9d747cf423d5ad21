"""Scores and measures over a real server that misbehaves: each fault is typed, counted, and counts both ways."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.judges import CachedJudge, JudgeRequest, OpenAIJudge
from sae_lens_multimodal.autointerp.measures import measure, read_measures
from sae_lens_multimodal.autointerp.metrics import balanced_accuracy
from sae_lens_multimodal.autointerp.results import Verdict, read_verdicts
from sae_lens_multimodal.autointerp.score import score
from sae_lens_multimodal.autointerp.scorers.base import Sampling
from sae_lens_multimodal.autointerp.scorers.intruder import IntruderScorer
from sae_lens_multimodal.autointerp.scorers.simulation import SimulationScorer
from sae_lens_multimodal.errors import JudgeError
from sae_lens_multimodal.features.store import FeatureStore
from tests.autointerp.sample import COLOURS, seen_colours
from tests.autointerp.server import Answer, Server, completion, error, serving

BOOK = GeneralPrompts()
RIGHT = [Explanation(feature=feature, text=colour) for feature, colour in enumerate(COLOURS)]
NUMBERS = [JudgeRequest(parts=(f"number {n}",)) for n in range(24)]


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def judge_at(url: str, **options: Any) -> OpenAIJudge:
    return OpenAIJudge("m", base_url=url, **{"max_retries": 0, "timeout_seconds": 20.0, "give_up_after": 99, **options})


def parts_of(body: dict[str, Any]) -> tuple[str, list[Image.Image]]:
    """The words and the pictures of a request."""
    words, pictures = "", []
    for part in body["messages"][0]["content"]:
        if part["type"] == "text":
            words += part["text"]
        else:
            data = part["image_url"]["url"].removeprefix("data:image/png;base64,")
            pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
    return words, pictures


def seeing(body: dict[str, Any]) -> str:
    words, pictures = parts_of(body)
    asked = next(colour for colour in COLOURS if f"Description: {colour}\n" in words)
    return "yes" if asked in seen_colours(pictures[0]) else "no"


FAULTS: tuple[tuple[str | None, Callable[[str, Server], Answer]], ...] = (
    (None, lambda said, _: completion(f'{{"answer": "{said}"}}')),
    (None, lambda said, _: completion(f'Well:\n```json\n{{"answer": "{said}"}}\n``` That is all.')),
    ("refused", lambda *_: completion(None, refusal="I would rather not.")),
    ("refused", lambda said, _: completion(said, finish_reason="content_filter")),
    ("server", lambda *_: error(429, "slow down")),
    ("server", lambda *_: error(500, "broken")),
    ("timeout", lambda said, server: (server.released.wait(20), completion(said))[1]),
    ("server", lambda said, _: completion(said)._replace(sent_share=0.5)),
    ("unparsable", lambda said, _: completion(f'{{"answer": ["{said}"]}}')),
    ("unparsable", lambda said, _: completion(f'{{"answer": "{said}", "{said}": "yes"')),
    ("unparsable", lambda said, _: completion(f"{said}, or rather not")),
    ("rejected", lambda *_: error(400, "too long")),
    ("empty", lambda *_: completion("  ")),
    ("empty", lambda *_: Answer(200, '{"choices": [{"message": {"content": 3}}]}')),
)
"""How a server answers, and what kind of failure that is."""


def test_every_fault_at_once_is_typed_counted_and_scored_both_ways(store: FeatureStore, tmp_path: Path) -> None:
    expected: Counter[str] = Counter()

    def answer(number: int, body: dict[str, Any], server: Server) -> Answer:
        kind, give = FAULTS[number % len(FAULTS)]
        expected[kind or "answered"] += 1
        return give(seeing(body), server)

    with serving(answer) as server:
        judge = judge_at(server.url, concurrency=8, timeout_seconds=3.0)
        few = Sampling(n_positive=3, n_negative=3)
        scores = score(store, judge, RIGHT, output=tmp_path / "out", prompts=BOOK, sampling=few, progress=False)
    verdicts = read_verdicts(tmp_path / "out")
    found = Counter("answered" if one.failure is None else one.failure.kind.value for one in verdicts)
    assert found == expected
    assert set(expected) == {"answered", "refused", "server", "timeout", "unparsable", "rejected", "empty"}
    assert len(verdicts) == len(server.bodies) == 2 * sum(one.n for one in scores), "nothing is lost"
    for one in scores:
        own = [v for v in verdicts if (v.feature, v.scorer, v.control) == (one.feature, one.scorer, False)]
        other = [v for v in verdicts if (v.feature, v.scorer, v.control) == (one.feature, one.scorer, True)]
        assert all((v.answer is None) == (v.failure is not None) for v in own), "and nothing invented"
        assert one.n_failed == sum(v.failure is not None for v in own)
        answered = [v for v in own if v.answer is not None]
        assert one.balanced_accuracy == _accuracy(answered)
        assert one.balanced_accuracy_strict == pytest.approx(_share(own, lambda v: v.answer is v.truth))
        kept = _share(other, lambda v: v.answer is v.truth or v.answer is None)
        assert one.control_balanced_accuracy_strict == pytest.approx(kept)


def _accuracy(verdicts: list[Verdict]) -> float | None:
    return balanced_accuracy([v.truth for v in verdicts], [v.answer for v in verdicts])


def _share(verdicts: list[Verdict], right: Callable[[Verdict], bool]) -> float:
    """Mean over both kinds of item of the share that counts as right."""
    kinds = [[right(v) for v in verdicts if v.truth is truth] for truth in (True, False)]
    return sum(sum(kind) / len(kind) for kind in kinds) / 2


@pytest.mark.parametrize(
    "bad",
    [
        completion('{"intruder": 5}'),
        completion('{"intruder": [1, 2]}'),
        completion("the second, I think"),
        completion(""),
        error(500),
        completion('{"intruder": 1}')._replace(sent_share=0.5),
    ],
)
def test_intruders_that_were_not_found_count_both_ways(bad: Answer, store: FeatureStore, tmp_path: Path) -> None:
    """Half of the answers are a number that is sometimes right, half are of no use."""

    def answer(number: int, *_: Any) -> Answer:
        return bad if number % 2 else completion('{"intruder": 2}')

    with serving(answer) as server:
        scorer = IntruderScorer(judge_at(server.url, concurrency=1), BOOK)
        found = measure(store, RIGHT, [scorer], output=tmp_path, progress=False)
    for one in found:
        assert one.found.n_failed * 2 == one.found.n
        assert one.found.values["accuracy_strict"] == pytest.approx(one.found.values["accuracy"] / 2)
    assert read_measures(tmp_path) == found


GRID = [[9, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 9]]


@pytest.mark.parametrize(
    "bad",
    [
        completion(json.dumps({"grid": GRID[:3]})),
        completion(json.dumps({"grid": [row[:3] for row in GRID]})),
        completion(json.dumps({"grid": [*GRID, GRID[0]]})),
        completion(json.dumps({"grid": [GRID[0], GRID[1], GRID[2], [*GRID[3], 0]]})),
        completion(json.dumps({"grid": [GRID[0], GRID[1], GRID[2], [0, 0, 0, 10]]})),
        completion(json.dumps({"grid": [GRID[0], GRID[1], GRID[2], "0009"]})),
        completion(json.dumps(GRID)),
        error(503),
    ],
)
def test_grids_of_wrong_lengths_count_both_ways(bad: Answer, store: FeatureStore, tmp_path: Path) -> None:
    def seeing_grid(body: dict[str, Any]) -> Answer:
        words, (picture,) = parts_of(body)
        asked = next(colour for colour in COLOURS if f"Description: {colour}\n" in words)
        boxes = scorer._boxes(*picture.size)
        cells = [9 if asked in seen_colours(picture.crop(box), share=0.2) else 0 for box in boxes]
        return completion(json.dumps({"grid": [cells[start : start + 4] for start in range(0, 16, 4)]}))

    with serving(lambda number, body, _: bad if number % 3 == 1 else seeing_grid(body)) as server:
        scorer = SimulationScorer(judge_at(server.url, concurrency=1), BOOK)
        found = measure(store, RIGHT[:2], [scorer], output=tmp_path, progress=False)
    for one in found:
        assert (one.found.n, one.found.n_failed) == (6, 2)
        assert one.found.values["correlation"] > 0.5 > one.found.values["correlation_strict"]
        assert one.found.values["average_precision_strict"] < one.found.values["average_precision"]
        assert one.control is not None and one.control.n_failed == 2
        # what fails of a control counts for it
        assert one.control.values["correlation_strict"] > one.control.values["correlation"]


def test_a_server_that_is_killed_midway_costs_no_answer(tmp_path: Path) -> None:
    def answer(number: int, body: dict[str, Any], server: Server) -> Answer:
        whole = completion(body["messages"][0]["content"][0]["text"])
        if number < 10:
            return whole
        server.die()
        return whole._replace(sent_share=0.0)

    with serving(answer) as server:
        judge = CachedJudge(judge_at(server.url, concurrency=2), tmp_path / "a.sqlite")
        with pytest.raises(JudgeError, match=r"cannot be reached.*what was answered so far is kept"):
            judge.ask_all(NUMBERS, progress=False)
        n_asked = len(server.bodies)
        assert n_asked in (11, 12)
        assert len(judge) == 10
    with serving(lambda _, body, __: completion(body["messages"][0]["content"][0]["text"])) as server:
        inside = judge_at(server.url)
        inside._place = judge.judge._place  # type: ignore[attr-defined]  # the same server, come back
        outcomes = CachedJudge(inside, tmp_path / "a.sqlite").ask_all(NUMBERS, progress=False)
        assert len(server.bodies) == len(NUMBERS) - 10
    assert [getattr(one, "text", one) for one in outcomes] == [f"number {n}" for n in range(24)]


def test_measures_go_on_after_the_server_was_killed(store: FeatureStore, tmp_path: Path) -> None:
    """Of the features that were finished nothing is asked again, of the others only what is open."""

    def dying(number: int, _: dict[str, Any], server: Server) -> Answer:
        if number < 9:
            return completion('{"intruder": 2}')
        server.die()
        return completion('{"intruder": 2}')._replace(sent_share=0.0)

    with serving(dying) as server:
        judge = CachedJudge(judge_at(server.url, concurrency=1), tmp_path / "a.sqlite")
        with pytest.raises(JudgeError, match="cannot be reached"):
            measure(store, RIGHT, [IntruderScorer(judge, BOOK)], output=tmp_path / "out", progress=False)
        first = read_measures(tmp_path / "out")
    assert len(first) == 2, "four trials each"
    with serving(lambda *_: completion('{"intruder": 2}')) as server:
        inside = judge_at(server.url)
        inside._place = judge.judge._place  # type: ignore[attr-defined]  # the same server, come back
        again = CachedJudge(inside, tmp_path / "a.sqlite")
        found = measure(store, RIGHT, [IntruderScorer(again, BOOK)], output=tmp_path / "out", progress=False)
        assert len(server.bodies) == 4 * len(RIGHT) - 9
    assert found[:2] == first and len(found) == 4
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["calls"] - sum(ledger["failures"].values()) == 16


def test_a_command_that_is_stopped_ends_at_once_and_keeps_what_was_answered(tmp_path: Path) -> None:
    def answer(number: int, _: dict[str, Any], server: Server) -> Answer:
        if number >= 5:
            server.released.wait(60)
        return completion('{"answer": "yes"}')

    with serving(answer) as server:
        flags = ("--judge", "m", "--base-url", server.url, "--features", "3", "--output", str(tmp_path))
        command = [sys.executable, "-m", "sae_lens_multimodal.cli.main", "calibrate", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
        try:
            end = time.monotonic() + 120
            while len(server.bodies) < 13 and time.monotonic() < end and process.poll() is None:
                time.sleep(0.1)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            stopped = time.monotonic()
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert time.monotonic() - stopped < 15, "the requests under way would have taken a minute"
    assert "stopped" in said and "Traceback" not in said
    with closing(sqlite3.connect(tmp_path / "answers.sqlite")) as connection:
        assert connection.execute("SELECT COUNT(*) FROM answers").fetchone() == (5,)
