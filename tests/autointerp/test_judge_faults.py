"""A server that misbehaves while features are explained and scored: nothing lost, nothing invented, all counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
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
    Prices,
    ScriptedJudge,
)
from sae_lens_multimodal.autointerp.results import read_verdicts
from sae_lens_multimodal.autointerp.score import score
from sae_lens_multimodal.errors import ConfigError, JudgeError
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book
from tests.autointerp.sample import perfect
from tests.autointerp.server import Answer, Server, completion, error, serving

NUMBERS = [JudgeRequest(parts=(f"number {n}",)) for n in range(24)]
Reply = Callable[[int, dict[str, Any], Server], Answer]


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def judge_at(url: str, **options: Any) -> OpenAIJudge:
    return OpenAIJudge("m", base_url=url, **{"max_retries": 0, "timeout_seconds": 5.0, "give_up_after": 99, **options})


def echo(body: dict[str, Any]) -> Answer:
    return completion(body["messages"][0]["content"][0]["text"])


def number_of(body: dict[str, Any]) -> int:
    return int(body["messages"][0]["content"][0]["text"].split()[1])


def test_a_storm_of_refusals_is_waited_out_as_the_server_asks() -> None:
    tries: dict[int, int] = {}

    def storm(_: int, body: dict[str, Any], __: Server) -> Answer:
        tries[number_of(body)] = tries.get(number_of(body), 0) + 1
        if tries[number_of(body)] > 2:
            return echo(body)
        slow = error(429 if tries[number_of(body)] == 1 else 500, "slow down")
        return slow._replace(headers=(("Retry-After", "0.4"),))

    with serving(storm) as server:
        outcomes = judge_at(server.url, max_retries=2, concurrency=4).ask_all(NUMBERS[:8], progress=False)
    assert [getattr(one, "text", None) for one in outcomes] == [f"number {n}" for n in range(8)]
    for n in range(8):
        mine = [time for time, body in zip(server.times, server.bodies, strict=True) if number_of(body) == n]
        assert len(mine) == 3
        assert all(later - earlier >= 0.39 for earlier, later in pairwise(mine)), "Retry-After is obeyed"


def misbehaving(number: int, body: dict[str, Any], server: Server) -> Answer:
    kind = number_of(body) % 8
    if kind == 1:
        return error(429)
    if kind == 2:
        return echo(body)._replace(sent_share=0.6)
    if kind == 3:
        server.released.wait(20)
    if kind == 4:
        return completion("")
    if kind == 5:
        return Answer(200, '{"choices": [null], "usage": {"prompt_tokens": "seven"}}')
    if kind == 6:
        return Answer(200, '{"choices": [{"message": "number 6"}], "usage": "much"}')
    if kind == 7:
        return error(500)._replace(headers=(("Retry-After", "0"),))
    return echo(body)


def test_every_fault_is_typed_and_nothing_is_lost_or_invented(tmp_path: Path) -> None:
    with serving(misbehaving) as server:
        judge = CachedJudge(judge_at(server.url, timeout_seconds=0.7, concurrency=6), tmp_path / "a.sqlite")
        outcomes = judge.ask_all(NUMBERS, progress=False)
    kinds = [one.kind if isinstance(one, JudgeFailure) else one.text for one in outcomes]
    server_, empty = FailureKind.SERVER, FailureKind.EMPTY
    for start in (0, 8, 16):
        expected = [f"number {start}", server_, server_, FailureKind.TIMEOUT, empty, empty, empty, server_]
        assert kinds[start : start + 8] == expected
    assert judge.ledger.failures == {"server": 9, "timeout": 3, "empty": 9}
    assert judge.ledger.calls == 24
    assert len(judge) == 3, "only answers are kept"
    broken = outcomes[2]
    assert isinstance(broken, JudgeFailure)
    assert "broke off its answer" in broken.message


@pytest.mark.parametrize(
    "body",
    [
        '{"choices": [{"message": {"content": "yes", "refusal": ["no"]}}]}',
        '{"choices": [{"message": {"content": "yes"}}], "usage": {"prompt_tokens": -4, "completion_tokens": null}}',
        '{"choices": [{"message": {"content": {"text": "yes"}}}]}',
        '{"choices": [3]}',
        '{"choices": [[]]}',
        '{"choices": {"message": "yes"}}',
    ],
)
def test_wrong_types_anywhere_raise_nothing(body: str) -> None:
    with serving(lambda *_: Answer(200, body)) as server:
        judge = judge_at(server.url)
        outcome = judge.ask(NUMBERS[0])
    assert isinstance(outcome, JudgeFailure) or outcome.text == "yes"
    assert judge.ledger.tokens_in == judge.ledger.tokens_out == 0


def test_a_server_that_dies_midway_costs_no_answer(tmp_path: Path) -> None:
    """Those under way when it goes are waited for; the next run asks only for the rest."""

    def dying(number: int, body: dict[str, Any], server: Server) -> Answer:
        if number == 10:
            return error(401, "your key ran out")
        if number in (8, 9):
            server.released.wait(0.5)
        return echo(body)

    with serving(dying) as server:
        judge = CachedJudge(judge_at(server.url, concurrency=3), tmp_path / "a.sqlite")
        with pytest.raises(JudgeError, match="your key ran out"):
            judge.ask_all(NUMBERS, progress=False)
        answered = len(judge)
        assert answered == len(server.bodies) - 1, "all but the one that failed"
    with serving(lambda _, body, __: echo(body)) as server:
        url = server.url
        inside = judge_at(url)
        inside._place = judge.judge._place  # type: ignore[attr-defined]  # the same server, come back
        again = CachedJudge(inside, tmp_path / "a.sqlite")
        outcomes = again.ask_all(NUMBERS, progress=False)
        assert len(server.bodies) == len(NUMBERS) - answered
    assert [getattr(one, "text", None) for one in outcomes] == [f"number {n}" for n in range(24)]


RIGHT = [Explanation(feature=0, text="red"), Explanation(feature=1, text="green")]


@pytest.mark.parametrize(
    ("reply", "usable"),
    [
        ('Surely!\n```json\n{"answer": "yes"}\n```\nI hope that helps.', True),
        ('{"answer": "yes"} {"answer": "no"}', False),
        ('{"answer": ["yes", "no"]}', False),
        ('{"answer": 1}', False),
        ("It could be.", False),
    ],
)
def test_scores_never_guess_from_what_does_not_parse(
    reply: str, usable: bool, store: FeatureStore, tmp_path: Path
) -> None:
    with serving(lambda *_: completion(reply)) as server:
        judge = judge_at(server.url)
        options: dict[str, Any] = {"scorers": ["detection"], "control": False, "progress": False}
        (one,) = score(store, judge, RIGHT[:1], output=tmp_path, prompts=GeneralPrompts(), **options)
    assert one.n_failed == (0 if usable else one.n)
    assert one.balanced_accuracy == (0.5 if usable else None)
    assert one.balanced_accuracy_strict == (0.5 if usable else 0.0)
    for verdict in read_verdicts(tmp_path):
        assert (verdict.failure is None) == usable
        assert usable or (verdict.failure is not None and verdict.failure.reply == reply)


def test_a_dry_run_foretells_what_scoring_then_asks(store: FeatureStore, tmp_path: Path) -> None:
    asked = ScriptedJudge(perfect)
    cache = CachedJudge(asked, tmp_path / "a.sqlite")
    options: dict[str, Any] = {"prompts": scenes_prompt_book(), "progress": False}
    dry = ForecastJudge(cache)
    score(store, dry, RIGHT, output=tmp_path / "dry", **options)
    assert asked.requests == []
    score(store, cache, RIGHT, output=tmp_path / "real", **options)
    assert dry.forecast.calls == len(asked.requests) == cache.ledger.calls
    assert dry.forecast.pictures == sum(len(request.pictures) for request in asked.requests)
    assert dry.forecast.tokens_out == sum(request.max_new_tokens for request in asked.requests)
    assert dry.forecast.cached == cache.ledger.cached
    again = ForecastJudge(cache)
    score(store, again, RIGHT, output=tmp_path / "again", **options)
    assert (again.forecast.calls, again.forecast.tokens_in) == (0, 0)
    assert "0 calls" in again.forecast.line(Prices(input_per_million=1.0))


def test_a_budget_stops_and_a_larger_one_goes_on(store: FeatureStore, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompts": scenes_prompt_book(), "progress": False}
    first = ScriptedJudge(perfect)
    judge = CachedJudge(BudgetJudge(first, Budget(max_calls=25)), tmp_path / "a.sqlite")
    with pytest.raises(JudgeError, match=r"budget is spent \(25 of 25 calls\)"):
        score(store, judge, RIGHT, output=tmp_path / "out", **options)
    assert len(first.requests) == len(judge) == 25
    second = ScriptedJudge(perfect)
    judge = CachedJudge(BudgetJudge(second, Budget(max_calls=500)), tmp_path / "a.sqlite")
    found = score(store, judge, RIGHT, output=tmp_path / "out", **options)
    assert all(one.balanced_accuracy is not None for one in found)
    whole = ScriptedJudge(perfect)
    score(store, CachedJudge(whole, tmp_path / "b.sqlite"), RIGHT, output=tmp_path / "whole", **options)
    assert len(first.requests) + len(second.requests) == len(whole.requests), "nothing is asked twice"


def test_tokens_and_money_are_limits_too() -> None:
    def spend(budget: Budget) -> int:
        with serving(lambda _, body, __: echo(body)) as server:
            judge = BudgetJudge(judge_at(server.url), budget, at_once=2)
            with pytest.raises(JudgeError, match="budget is spent"):
                judge.ask_all(NUMBERS, progress=False)
        return judge.ledger.calls

    assert spend(Budget(max_tokens=45)) == 6, "nine tokens a call, two calls at once"
    prices = Prices(input_per_million=1e6, output_per_million=0)
    assert spend(Budget(max_money=28.0, prices=prices)) == 4, "seven tokens read a call"


@pytest.mark.parametrize("options", [{"max_calls": -1}, {"max_money": 3.0}])
def test_budgets_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Budget(**options)
    with pytest.raises(ConfigError):
        Prices(input_per_million=-1.0)
    with pytest.raises(ConfigError):
        BudgetJudge(ScriptedJudge([]), Budget(), at_once=0)


def test_a_reply_within_budget_is_passed_on_unchanged() -> None:
    judge = BudgetJudge(ScriptedJudge(lambda r: r.text, name="inner"), Budget())
    assert (judge.id, judge.cache_name) == ("inner", "inner")
    outcome = judge.ask(NUMBERS[3])
    assert isinstance(outcome, JudgeReply)
    assert json.dumps(outcome.text) == '"number 3"'


def test_one_feature_whose_requests_are_rejected_does_not_stop_the_others() -> None:
    def filtered(_: int, body: dict[str, Any], __: Server) -> Answer:
        return error(400, "content filter") if number_of(body) < 12 else echo(body)

    with serving(filtered) as server:
        judge = judge_at(server.url, give_up_after=3, concurrency=1)
        outcomes = judge.ask_all(NUMBERS, progress=False)
        assert [isinstance(one, JudgeReply) for one in outcomes] == [number >= 12 for number in range(24)]
        # a server that takes nothing at all is given up, though later
        with pytest.raises(JudgeError, match="failed 10 requests in a row"):
            judge_at(server.url, give_up_after=1, concurrency=1).ask_all(NUMBERS, progress=False)


def test_useless_replies_have_their_price(tmp_path: Path) -> None:
    def empty(_: int, __: dict[str, Any], ___: Server) -> Answer:
        return completion("")

    with serving(empty) as server:
        judge = BudgetJudge(CachedJudge(judge_at(server.url), tmp_path / "a.sqlite"), Budget(max_tokens=40))
        with pytest.raises(JudgeError, match="The budget is spent"):
            judge.ask_all(NUMBERS, progress=False)
    assert judge.ledger.tokens_in + judge.ledger.tokens_out >= 40


def test_a_key_that_the_server_echoes_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")

    def echoes(_: int, __: dict[str, Any], server: Server) -> Answer:
        return error(400, f"bad key {server.headers[-1]['authorization']}")

    with serving(echoes) as server:
        judge = judge_at(server.url, extra_body={"api_key": "sk-other-secret"})
        (outcome,) = judge.ask_all(NUMBERS[:1], progress=False)
    assert isinstance(outcome, JudgeFailure)
    assert "[key]" in outcome.message and "secret" not in outcome.message
    assert "secret" not in judge.cache_name
    assert judge.cache_name != judge_at(server.url).cache_name
