"""What every judge shares: requests, outcomes, the ledger, the answer cache; and the judge in this process."""

from __future__ import annotations

import dataclasses
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.judges import (
    CachedJudge,
    FailureKind,
    JudgeFailure,
    JudgeReply,
    JudgeRequest,
    ScriptedJudge,
    TransformersJudge,
)
from sae_lens_multimodal.autointerp.judges.transformers_judge import fingerprint
from sae_lens_multimodal.errors import ConfigError, JudgeError, StoreError
from sae_lens_multimodal.scenes import make_scene
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
PARTS = st.lists(st.text("ab\0|", max_size=4), min_size=1, max_size=4)
REQUEST = JudgeRequest(parts=("a", RED, "b"))


@pytest.mark.parametrize(
    "other",
    [
        {"parts": ("a", BLUE, "b")},
        {"parts": (RED, "a", "b")},
        {"parts": ("ab", RED)},
        {"parts": ("a", RED.resize((4, 16)), "b")},
        {"max_new_tokens": 65},
        {"choices": ("yes",)},
        {"prompt_version": "2"},
    ],
)
def test_digest_depends_on_everything_that_can_change_the_answer(other: dict[str, object]) -> None:
    assert dataclasses.replace(REQUEST, **other).digest != REQUEST.digest  # type: ignore[arg-type]
    assert JudgeRequest(parts=("a", RED.copy(), "b")).digest == REQUEST.digest


@settings(deadline=None)
@given(PARTS, PARTS)
def test_digest_keeps_parts_apart(left: list[str], right: list[str]) -> None:
    same = JudgeRequest(parts=tuple(left)).digest == JudgeRequest(parts=tuple(right)).digest
    assert same == (left == right)


def test_failure_survives_the_way_to_disk() -> None:
    found = JudgeFailure.of(REQUEST, FailureKind.TIMEOUT, "two\nlines", "raw")
    assert found.message == "two lines"
    assert found.prompt == "a\n<image>\nb"
    assert JudgeFailure.from_json(found.to_json()) == found


def test_choices_are_enforced_and_the_raw_reply_is_kept() -> None:
    request = JudgeRequest(parts=("?",), choices=("yes", "no"))
    judge = ScriptedJudge(["No.", "maybe", "  "])
    first, second, third = judge.ask_all([request] * 3, progress=False)
    assert isinstance(first, JudgeReply)
    assert first.text == "no"
    assert isinstance(second, JudgeFailure)
    assert (second.kind, second.reply) == (FailureKind.UNPARSABLE, "maybe")
    assert isinstance(third, JudgeFailure)
    assert third.kind is FailureKind.EMPTY
    assert judge.ledger.failures == {"unparsable": 1, "empty": 1}
    assert judge.ledger.calls == 3


def test_script_that_runs_out_says_so() -> None:
    with pytest.raises(JudgeError, match="ran out after 1 replies"):
        ScriptedJudge(["yes"]).ask_all([REQUEST] * 2, progress=False)


def test_cache_asks_once_across_runs_and_within_one(tmp_path: Path) -> None:
    requests = [JudgeRequest(parts=(f"{n % 3}",)) for n in range(9)]
    inner = ScriptedJudge(lambda request: f"answer {request.text}")
    judge = CachedJudge(inner, tmp_path / "deep" / "answers.sqlite")
    first = judge.ask_all(requests, progress=False)
    assert len(inner.requests) == 3
    assert [getattr(one, "text", "") for one in first] == [f"answer {n % 3}" for n in range(9)]
    again = CachedJudge(ScriptedJudge([], name="scripted"), tmp_path / "deep" / "answers.sqlite")
    second = again.ask_all(requests, progress=False)
    assert [getattr(one, "text", "") for one in second] == [getattr(one, "text", "") for one in first]
    assert (again.ledger.calls, again.ledger.cached, len(again)) == (0, 9, 3)
    other = CachedJudge(ScriptedJudge(lambda _: "other", name="another judge"), tmp_path / "deep" / "answers.sqlite")
    assert getattr(other.ask(requests[0]), "text", "") == "other"


def test_cache_keeps_what_does_not_parse_but_tries_other_failures_again(tmp_path: Path) -> None:
    request = JudgeRequest(parts=("?",), choices=("yes", "no"))
    late = JudgeRequest(parts=("late",))

    def answer(asked: JudgeRequest) -> str | JudgeFailure:
        return JudgeFailure.of(asked, FailureKind.TIMEOUT, "late") if asked is late else "maybe"

    inner = ScriptedJudge(answer)
    judge = CachedJudge(inner, tmp_path / "answers.sqlite")
    for _ in range(2):
        found = judge.ask_all([request, late], progress=False)
        assert [one.kind for one in found if isinstance(one, JudgeFailure)] == ["unparsable", "timeout"]
    assert [one is late for one in inner.requests] == [False, True, True]
    assert judge.ledger.failures == {"unparsable": 2, "timeout": 2}


def test_something_else_is_no_answer_cache(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, " * 100)
    with pytest.raises(StoreError, match="not an answer cache"):
        CachedJudge(ScriptedJudge([]), tmp_path / "notes.txt")
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as connection:
        connection.execute("CREATE TABLE other (x)")
        connection.commit()
    with pytest.raises(StoreError, match="schema version 0"):
        CachedJudge(ScriptedJudge([]), tmp_path / "other.sqlite")


def test_batches_do_not_change_answers(model: VisionLanguageModel) -> None:
    book = scenes_prompt_book()
    pictures = [make_scene(seed).image for seed in range(7)]
    made = [book.detect_image("red circle", picture) for picture in pictures]
    made += [book.explain_images([[picture], [picture]], []) for picture in pictures[:3]]
    made += [book.explain_texts(["a [ red ] star ."], []), book.detect_text("red", "a blue solid star .")]
    requests = [request for request in made if request is not None]
    together = TransformersJudge(model, batch_size=16).ask_all(requests, progress=False)
    alone = TransformersJudge(model, batch_size=1).ask_all(requests, progress=False)
    assert [_said(one) for one in together] == [_said(one) for one in alone]


def _said(outcome: JudgeReply | JudgeFailure) -> str | None:
    return outcome.text if isinstance(outcome, JudgeReply) else outcome.reply


def test_picture_placeholder_in_a_text_fails_alone(model: VisionLanguageModel) -> None:
    good = JudgeRequest(parts=("what is this ?",), max_new_tokens=4)
    bad = JudgeRequest(parts=("what is <image> ?",), max_new_tokens=4)
    outcomes = TransformersJudge(model).ask_all([good, bad, good], progress=False)
    kinds = [one.kind if isinstance(one, JudgeFailure) else None for one in outcomes]
    assert kinds[1] is FailureKind.REJECTED
    assert kinds[0] is not FailureKind.REJECTED
    assert _said(outcomes[0]) == _said(outcomes[2])


def test_running_out_of_memory_says_what_to_do(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> list[str]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    judge = TransformersJudge(model, batch_size=4)
    monkeypatch.setattr(judge.model, "generate", full, raising=False)
    with pytest.raises(JudgeError, match="batch_size smaller than 4"):
        judge.ask(REQUEST)


def test_fingerprint_tells_weights_apart() -> None:
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        second.weight += 1e-3
    assert fingerprint(first) != fingerprint(second)


def test_batch_size_must_be_positive(model: VisionLanguageModel) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0"):
        TransformersJudge(model, batch_size=0)
