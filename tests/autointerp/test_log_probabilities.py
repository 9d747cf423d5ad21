"""How sure a judge was: from the model in this process, from a server, through the cache, as a probability of yes."""

from __future__ import annotations

import hashlib
import math
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp import schemas
from sae_lens_multimodal.autointerp.confidence import probability_of_yes
from sae_lens_multimodal.autointerp.judges import (
    Budget,
    BudgetJudge,
    CachedJudge,
    FailureKind,
    ForecastJudge,
    JudgeFailure,
    JudgeReply,
    JudgeRequest,
    OpenAIJudge,
    ReplyToken,
    ScriptedJudge,
    TransformersJudge,
)
from sae_lens_multimodal.scenes import make_scene
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book
from tests.autointerp.server import Answer, Server, completion, error, serving

BOOK = scenes_prompt_book()
PICTURES = [make_scene(seed).image for seed in range(3)]


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def told(outcome: Any) -> tuple[ReplyToken, ...]:
    assert isinstance(outcome, JudgeReply), outcome
    assert outcome.log_probabilities is not None
    return outcome.log_probabilities


def inputs_of(model: VisionLanguageModel, request: JudgeRequest, reply: str) -> dict[str, Any]:
    """What transformers' own processor makes of a request and the beginning of its answer."""
    parts = [{"type": "text", "text": one} if isinstance(one, str) else {"type": "image"} for one in request.parts]
    chat = [{"role": "user", "content": parts}]
    text = model.processor.apply_chat_template(chat, add_generation_prompt=True) + reply
    return dict(model.processor(images=list(request.pictures), text=text, return_tensors="pt"))


def test_the_model_here_tells_what_its_own_forward_gives(model: VisionLanguageModel) -> None:
    made = [BOOK.detect_image("red circle", picture) for picture in PICTURES]
    requests = [replace(one, top_log_probabilities=4) for one in made if one is not None]
    for request, outcome in zip(requests, TransformersJudge(model).ask_all(requests, progress=False), strict=True):
        (token,) = told(outcome)
        with torch.no_grad():
            logits = model._module(**inputs_of(model, request, "")).logits[0, -1]
        values, ids = logits.float().log_softmax(-1).topk(4)
        assert [one for one, _ in token.top] == [model.tokenizer.decode([one]) for one in ids.tolist()]
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert (token.token, token.log_probability) == token.top[0]
        odds = dict(token.top)
        expected = math.exp(odds["yes"]) / (math.exp(odds["yes"]) + math.exp(odds["no"]))
        assert probability_of_yes(told(outcome)) == pytest.approx(expected)


def test_given_words_are_as_likely_as_in_the_models_own_forward(model: VisionLanguageModel) -> None:
    asked = [BOOK.explain_images([[picture]], []) for picture in PICTURES]
    requests = [replace(one, given_reply=words) for one in asked for words in ("red circle", "blue")]
    judge = TransformersJudge(model, batch_size=4)
    for request, outcome in zip(requests, judge.ask_all(requests, progress=False), strict=True):
        words = str(request.given_reply)
        ids = model.tokenizer(words, add_special_tokens=False)["input_ids"]
        inputs = inputs_of(model, request, words)
        assert inputs["input_ids"][0, -len(ids) :].tolist() == ids
        with torch.no_grad():
            logits = model._module(**inputs).logits[0].float().log_softmax(-1)
        expected = [float(logits[place - 1 - len(ids), one]) for place, one in enumerate(ids)]
        assert [one.log_probability for one in told(outcome)] == pytest.approx(expected, abs=1e-3)
        assert "".join(one.token for one in told(outcome)) == words
    unknown = judge.ask(replace(requests[0], given_reply="wheels"))
    assert isinstance(unknown, JudgeFailure)
    assert (unknown.kind, "no tokens for the words 'wheels'" in unknown.message) == (FailureKind.REJECTED, True)


def token(text: str, probability: float, **others: float) -> ReplyToken:
    top = [(other, math.log(value)) for other, value in others.items()]
    return ReplyToken(token=text, log_probability=math.log(probability), top=tuple(top))


JSON = [token('{"', 1.0), token("answer", 1.0), token('": "', 1.0)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([token("yes", 0.8, yes=0.8, no=0.2)], 0.8),
        ([token("No", 0.6, No=0.6, no=0.1, Yes=0.3)], 0.3),
        ([*JSON, token("yes", 0.5, yes=0.5, no=0.25, maybe=0.25), token('"}', 1.0)], 2 / 3),
        ([token('{"answer":', 1.0), token(" true", 0.9, **{" true": 0.9, " false": 0.1}), token("}", 1.0)], 0.9),
        ([token("y", 0.9, y=0.9, n=0.1), token("es", 1.0)], 0.9),
        # what is not named gets what is left over, and no more than the least that is named
        ([token("yes", 0.9, yes=0.9, t=0.08)], 0.9 / 0.92),
        ([token("no", 0.75)], 0.25),
        ([token("perhaps", 1.0)], None),
        ([token("yes", 1.0), token(" or", 1.0), token(" no", 1.0)], None),
        ([token('{"answer": "yes"', 1.0)], None),
        ([], None),
    ],
)
def test_probability_of_yes_is_read_where_the_reply_answers(tokens: list[ReplyToken], expected: float | None) -> None:
    found = probability_of_yes(tokens)
    assert found == (None if expected is None else pytest.approx(expected))


def entry(text: Any, value: Any, top: Any = ()) -> dict[str, Any]:
    return {"token": text, "logprob": value, "top_logprobs": [{"token": one, "logprob": at} for one, at in top]}


def judge_at(url: str, **options: Any) -> OpenAIJudge:
    return OpenAIJudge("m", base_url=url, **{"max_retries": 0, "timeout_seconds": 5.0, **options})


SURE = JudgeRequest(parts=("is it red ?",), top_log_probabilities=5, schema=schemas.VERDICT)


def test_a_server_is_asked_for_them_and_what_it_gives_survives_the_cache(tmp_path: Path) -> None:
    answer = completion("yes", logprobs=[entry("yes", -0.2, [("no", -1.7), ("yes", -0.2)])])
    with serving(lambda *_: answer) as server:
        judge = CachedJudge(judge_at(server.url), tmp_path / "a.sqlite")
        first, second = judge.ask(SURE), judge.ask(SURE)
        plain = judge.ask(replace(SURE, top_log_probabilities=0))
    assert [(body.get("logprobs"), body.get("top_logprobs")) for body in server.bodies] == [(True, 5), (None, None)]
    assert told(first) == (ReplyToken(token="yes", log_probability=-0.2, top=(("yes", -0.2), ("no", -1.7))),)
    assert isinstance(second, JudgeReply) and second.cached
    assert told(second) == told(first)
    assert isinstance(plain, JudgeReply) and plain.log_probabilities is None


@pytest.mark.parametrize(
    "logprobs",
    [
        "many",
        [],
        [3],
        [entry("yes", "unlikely")],
        [entry("yes", None)],
        [entry(None, -0.2)],
        [entry("yes", True)],
        [entry("yes", -0.2, [("no", "x")])],
        [entry("yes", -0.2), None],
    ],
)
def test_log_probabilities_of_other_shapes_are_none_and_the_reply_stays(logprobs: Any) -> None:
    with serving(lambda *_: completion("yes", logprobs=logprobs)) as server:
        reply = judge_at(server.url).ask(SURE)
    assert isinstance(reply, JudgeReply)
    assert (reply.text, reply.log_probabilities) == ("yes", None)


@pytest.mark.parametrize(
    ("status", "field"),
    [(400, "logprobs"), (403, "logprobs"), (422, "logprobs"), (400, "response_format"), (422, "response_format")],
)
def test_a_server_that_refuses_them_is_asked_without_from_then_on(
    status: int, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(_: int, body: dict[str, Any], __: Server) -> Answer:
        return error(status, f"no {field} here") if field in body else completion("yes")

    with serving(answer) as server:
        judge = judge_at(server.url, structured=True, concurrency=1)
        outcomes = judge.ask_all([SURE, replace(SURE, parts=("is it blue ?",))], progress=False)
        assert judge.gives_log_probabilities is (field != "logprobs")
        assert CachedJudge(judge, ":memory:").gives_log_probabilities is (field != "logprobs")
    assert [getattr(one, "text", one) for one in outcomes] == ["yes", "yes"]
    other = {"logprobs": "response_format", "response_format": "logprobs"}[field]
    assert [field in body for body in server.bodies][-1] is False
    assert other in server.bodies[-1], "what it takes is asked for still"
    assert caplog.text.count("it is asked without") == 1


def test_a_server_that_forbids_everything_is_down() -> None:
    with serving(lambda *_: error(403, "not yours")) as server, pytest.raises(RuntimeError, match="not yours"):
        judge_at(server.url).ask(SURE)


def test_given_words_are_no_question_for_a_server() -> None:
    with serving(lambda *_: completion("yes")) as server:
        judge = judge_at(server.url)
        found = judge.ask(replace(SURE, given_reply="red"))
    assert isinstance(found, JudgeFailure) and found.kind is FailureKind.REJECTED
    assert server.bodies == [] and not judge.rates_given_replies


def test_wrapped_judges_can_what_the_one_inside_can(model: VisionLanguageModel, tmp_path: Path) -> None:
    inside = TransformersJudge(model)
    plain = judge_at("http://127.0.0.1:9/v1")
    for judge in (inside, plain):
        for around in (BudgetJudge(judge, Budget()), ForecastJudge(judge), CachedJudge(judge, tmp_path / "a.sqlite")):
            assert around.rates_given_replies is (judge is inside)
            assert around.gives_log_probabilities


def test_requests_that_want_none_have_the_digest_they_always_had() -> None:
    content = hashlib.sha256()
    for piece in (b"v|7|None", b"textis it red ?"):
        content.update(len(piece).to_bytes(8, "big") + piece)
    request = JudgeRequest(parts=("is it red ?",), max_new_tokens=7, prompt_version="v")
    assert request.digest == content.hexdigest()
    others = {replace(request, top_log_probabilities=n).digest for n in (1, 2)}
    others |= {replace(request, given_reply=words).digest for words in ("", "a", "b")}
    assert len(others | {request.digest}) == 6


def test_an_answer_cache_of_before_is_read_and_written_on(tmp_path: Path) -> None:
    file, request = tmp_path / "old.sqlite", JudgeRequest(parts=("is it red ?",))
    key = hashlib.sha256(f"scripted\n{request.digest}".encode()).hexdigest()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(
            "CREATE TABLE answers (key TEXT PRIMARY KEY, judge TEXT NOT NULL, prompt TEXT NOT NULL, reply TEXT NOT "
            "NULL, tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, seconds REAL NOT NULL, created TEXT NOT "
            "NULL DEFAULT CURRENT_TIMESTAMP)"
        )
        connection.execute("PRAGMA user_version = 1")
        values = (key, "scripted", request.text, "an old answer", 3, 4, 0.5)
        connection.execute(
            "INSERT INTO answers (key, judge, prompt, reply, tokens_in, tokens_out, seconds) VALUES (?,?,?,?,?,?,?)",
            values,
        )
        connection.commit()
    new = JudgeReply(text="yes", log_probabilities=(token("yes", 0.5),))
    judge = CachedJudge(ScriptedJudge(lambda _: new), file)
    old = judge.ask(request)
    assert isinstance(old, JudgeReply) and (old.text, old.cached, old.tokens_in) == ("an old answer", True, 3)
    for _ in range(2):
        assert told(judge.ask(SURE)) == new.log_probabilities
    assert (judge.ledger.calls, len(judge)) == (1, 2)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,), "older versions of the package read it"
        assert connection.execute("SELECT reply FROM answers WHERE key = ?", (key,)).fetchone() == ("an old answer",)
