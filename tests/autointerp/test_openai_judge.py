"""The judge behind a server: what it sends, and what it makes of every way in which a server can fail."""

from __future__ import annotations

import base64
import io
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sae_lens_multimodal.autointerp import schemas
from sae_lens_multimodal.autointerp.judges import (
    CachedJudge,
    FailureKind,
    JudgeFailure,
    JudgeReply,
    JudgeRequest,
    OpenAIJudge,
    Outcome,
)
from sae_lens_multimodal.errors import ConfigError, JudgeError
from tests.autointerp.server import Answer, Server, completion, error, serving

REQUEST = JudgeRequest(parts=("is it red ?",), max_new_tokens=3)
YES_NO = JudgeRequest(parts=("is it red ?",), choices=("yes", "no"))


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def judge_at(url: str, **options: Any) -> OpenAIJudge:
    return OpenAIJudge("m", base_url=url, **{"max_retries": 0, "timeout_seconds": 5.0, **options})


def failure(outcome: Outcome) -> JudgeFailure:
    assert isinstance(outcome, JudgeFailure), outcome
    return outcome


def test_sends_text_and_pictures_in_order_without_loss() -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    request = JudgeRequest(parts=("one", Image.fromarray(pixels), "two"), max_new_tokens=5)
    with serving(lambda *_: completion(" yes ")) as server:
        reply = judge_at(server.url).ask(request)
    assert isinstance(reply, JudgeReply)
    assert (reply.text, reply.tokens_in, reply.tokens_out) == ("yes", 7, 2)
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 5)
    (message,) = body["messages"]
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "text"]
    url = message["content"][1]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    np.testing.assert_array_equal(np.asarray(sent), pixels)


def test_token_limit_and_temperature_can_be_spelt_as_the_server_wants() -> None:
    options: dict[str, Any] = {
        "temperature": None,
        "token_limit_field": "max_completion_tokens",
        "extra_body": {"a": 1},
    }
    with serving(lambda *_: completion("yes")) as server:
        judge_at(server.url, **options).ask(REQUEST)
    body = server.bodies[0]
    assert body["max_completion_tokens"] == 3
    assert body["a"] == 1
    assert not {"temperature", "max_tokens"} & body.keys()


def test_outcomes_come_in_the_order_of_the_requests_however_the_server_answers() -> None:
    requests = [JudgeRequest(parts=(f"number {n}",)) for n in range(20)]
    with serving(lambda _, body, __: completion(body["messages"][0]["content"][0]["text"])) as server:
        judge = judge_at(server.url, concurrency=7)
        outcomes = judge.ask_all(requests, progress=False)
    assert [getattr(one, "text", None) for one in outcomes] == [f"number {n}" for n in range(20)]
    assert judge.ledger.to_json() | {"seconds": 0} == {
        "calls": 20,
        "cached": 0,
        "tokens_in": 140,
        "tokens_out": 40,
        "seconds": 0,
        "failures": {},
    }


def test_server_error_is_tried_again_then_a_failure() -> None:
    with serving(lambda n, *_: error(500, "broken") if n < 1 else completion("yes")) as server:
        assert isinstance(judge_at(server.url, max_retries=1).ask(REQUEST), JudgeReply)
        assert len(server.bodies) == 2
    with serving(lambda *_: error(500, "broken\nfor good")) as server:
        found = failure(judge_at(server.url).ask(REQUEST))
    assert found.kind is FailureKind.SERVER
    assert "broken for good" in found.message
    assert "\n" not in found.message
    assert found.prompt == "is it red ?"
    assert found.digest == REQUEST.digest


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (completion(""), FailureKind.EMPTY),
        (completion(None), FailureKind.EMPTY),
        (completion(None, refusal="I will not."), FailureKind.REFUSED),
        (completion("part", finish_reason="content_filter"), FailureKind.REFUSED),
        (completion("perhaps"), FailureKind.UNPARSABLE),
        (error(400, "too long"), FailureKind.REJECTED),
        (error(429, "slow down"), FailureKind.SERVER),
        (Answer(200, "<html>hello</html>", "text/html"), FailureKind.SERVER),
        (Answer(200, '{"choices": "none"}'), FailureKind.SERVER),
        (Answer(200, '{"choices": []}'), FailureKind.EMPTY),
        (Answer(200, '{"choices": [{}]}'), FailureKind.EMPTY),
        (Answer(200, '{"choices": [{"message": {"content": [1, 2]}}]}'), FailureKind.EMPTY),
        (Answer(200, "{not json"), FailureKind.SERVER),
        (Answer(200, "[]"), FailureKind.SERVER),
    ],
)
def test_every_bad_answer_is_one_typed_failure(answer: Answer, kind: FailureKind) -> None:
    with serving(lambda *_: answer) as server:
        judge = judge_at(server.url)
        found = failure(judge.ask(YES_NO))
    assert found.kind is kind
    assert "\n" not in found.message
    assert judge.ledger.failures == {kind.value: 1}


def test_raw_reply_is_kept_where_it_does_not_parse() -> None:
    with serving(lambda *_: completion(" Perhaps, perhaps not. ")) as server:
        assert failure(judge_at(server.url).ask(YES_NO)).reply == " Perhaps, perhaps not. "


def test_hanging_server_is_a_timeout() -> None:
    def hang(_: int, __: dict[str, Any], server: Server) -> Answer:
        server.released.wait(10)
        return completion("yes")

    with serving(hang) as server:
        found = failure(judge_at(server.url, timeout_seconds=0.3).ask(REQUEST))
    assert found.kind is FailureKind.TIMEOUT


def test_refused_connection_says_so_in_one_line() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(JudgeError, match=r"m at 127\.0\.0\.1:\d+ cannot be reached \(.*refused.*\)") as caught:
            judge_at(url).ask(REQUEST)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("status", "message"), [(401, "bad key"), (403, "not yours"), (404, "no such model")])
def test_what_no_request_can_pass_stops_at_once(status: int, message: str) -> None:
    with serving(lambda *_: error(status, message)) as server, pytest.raises(JudgeError, match=message):
        judge_at(server.url, concurrency=1).ask_all([REQUEST] * 20, progress=False)
    assert len(server.bodies) == 1


def test_many_failures_in_a_row_stop_and_what_was_answered_is_kept(tmp_path: Any) -> None:
    requests = [JudgeRequest(parts=(f"number {n}",)) for n in range(30)]

    def dies(number: int, body: dict[str, Any], _: Server) -> Answer:
        return completion(body["messages"][0]["content"][0]["text"]) if number < 6 else error(500, "out of memory")

    with serving(dies) as server:
        judge = CachedJudge(judge_at(server.url, concurrency=1, give_up_after=4), tmp_path / "answers.sqlite")
        with pytest.raises(JudgeError, match=r"failed 4 requests in a row.*out of memory"):
            judge.ask_all(requests, progress=False)
        assert len(server.bodies) == 10
    assert len(judge) == 6


def test_a_failure_now_and_then_does_not_stop() -> None:
    with serving(lambda n, *_: error(500) if n % 2 else completion("yes")) as server:
        outcomes = judge_at(server.url, concurrency=1, give_up_after=2).ask_all([REQUEST] * 8, progress=False)
    assert [isinstance(one, JudgeReply) for one in outcomes] == [True, False] * 4


def test_key_comes_from_the_environment_and_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with serving(lambda *_: completion("yes")) as server:
        judge = CachedJudge(judge_at(server.url, api_key_variable="MY_KEY"), tmp_path / "answers.sqlite")
        judge.ask(REQUEST)
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
    assert b"secret" not in (tmp_path / "answers.sqlite").read_bytes()
    assert "secret" not in judge.cache_name + repr(judge.judge.__dict__)


def test_credentials_in_the_url_are_not_part_of_the_name() -> None:
    judge = judge_at("http://user:hidden@127.0.0.1:9/v1?token=hidden")
    assert judge.id == "m at 127.0.0.1:9"
    assert "hidden" not in judge.cache_name


def test_hosted_server_wants_a_key() -> None:
    with pytest.raises(JudgeError, match="OPENAI_API_KEY is not set"):
        OpenAIJudge("gpt-4o")


@pytest.mark.parametrize("options", [{"base_url": "localhost:8000"}, {"concurrency": 0}, {"timeout_seconds": 0}])
def test_settings_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OpenAIJudge("m", **{"base_url": "http://127.0.0.1:1/v1", **options})


@pytest.fixture
def base_url_from_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(lambda *_: completion("yes")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        yield server


def test_base_url_from_the_environment(base_url_from_environment: Server) -> None:
    assert isinstance(OpenAIJudge("m").ask(REQUEST), JudgeReply)
    assert len(base_url_from_environment.bodies) == 1


def test_all_requests_wait_where_one_was_too_many() -> None:
    def answer(number: int, _: dict[str, Any], __: Server) -> Answer:
        if number == 0:
            return error(429, "slow down")._replace(headers=(("Retry-After", "0.6"),))
        return completion("yes")

    with serving(answer) as server:
        requests = [JudgeRequest(parts=(str(number),)) for number in range(6)]
        outcomes = judge_at(server.url, concurrency=1, max_retries=1).ask_all(requests, progress=False)
        assert all(isinstance(one, JudgeReply) for one in outcomes)
        assert min(server.times[1:]) - server.times[0] >= 0.59
    with serving(answer) as server:
        judge = judge_at(server.url, concurrency=1)
        failed, *others = judge.ask_all(requests, progress=False)
        assert isinstance(failed, JudgeFailure) and len(others) == 5
        assert server.times[1] - server.times[0] >= 0.59, "other requests wait, too"


VERDICT = JudgeRequest(parts=("is it red ?",), schema=schemas.VERDICT)


def test_a_reply_is_held_to_its_schema_where_asked_for() -> None:
    with serving(lambda *_: completion('{"answer": "yes"}')) as server:
        judge_at(server.url).ask(VERDICT)
        judge_at(server.url, structured=True).ask(VERDICT)
        judge_at(server.url, structured=True).ask(REQUEST)
    assert "response_format" not in server.bodies[0]
    assert server.bodies[1]["response_format"]["type"] == "json_schema"
    schema = server.bodies[1]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["answer"]["enum"] == ["yes", "no"] and schema["additionalProperties"] is False
    assert "response_format" not in server.bodies[2], "a request without a schema"
    names = [judge_at(server.url, structured=value).cache_name for value in (False, True)]
    assert names[0] != names[1], "answers of the one are not those of the other"


def test_a_server_without_schemas_is_asked_without_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    def answer(_: int, body: dict[str, Any], __: Server) -> Answer:
        return error(400, "unknown field response_format") if "response_format" in body else completion("yes")

    with serving(answer) as server:
        judge = judge_at(server.url, structured=True, concurrency=1)
        outcomes = judge.ask_all([VERDICT] * 3, progress=False)
    assert [one.text for one in outcomes if isinstance(one, JudgeReply)] == ["yes"] * 3
    assert ["response_format" in body for body in server.bodies] == [True, False, False, False]
    assert "takes no JSON schemas" in caplog.text


def test_a_request_refused_for_itself_does_not_end_schemas() -> None:
    def answer(number: int, *_: Any) -> Answer:
        return error(400, "too long") if number < 2 else completion("yes")

    with serving(answer) as server:
        judge = judge_at(server.url, structured=True, concurrency=1)
        first, second = judge.ask_all([VERDICT] * 2, progress=False)
    assert isinstance(first, JudgeFailure) and first.kind is FailureKind.REJECTED
    assert isinstance(second, JudgeReply)
    assert ["response_format" in body for body in server.bodies] == [True, False, True]
