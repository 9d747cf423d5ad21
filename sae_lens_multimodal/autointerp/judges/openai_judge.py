"""A judge behind an OpenAI-compatible server, asked through the official client."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from itertools import combinations, islice
from typing import Any, Literal, NamedTuple

from sae_lens_multimodal.autointerp.judges.background import BackgroundLoop
from sae_lens_multimodal.autointerp.judges.base import (
    FailureKind,
    Judge,
    JudgeFailure,
    JudgeReply,
    JudgeRequest,
    Outcome,
)
from sae_lens_multimodal.autointerp.judges.openai_reply import (
    is_refused_connection,
    messages_of,
    outcome_of,
    root_of,
    said_by,
    status_kind,
)
from sae_lens_multimodal.autointerp.judges.openai_settings import api_key, check_settings, place_of
from sae_lens_multimodal.autointerp.judges.pause import SharedPause, asked_seconds, growing_seconds
from sae_lens_multimodal.errors import JudgeError

logger = logging.getLogger(__name__)

_WITHOUT_ANSWER = frozenset({FailureKind.SERVER, FailureKind.TIMEOUT})
_BUSY = frozenset({429, 503})
"""With these, what a server asks for goes for every request."""
_REJECTIONS = 10
"""A server that has answered nothing yet may reject so many times more requests than it may leave unanswered: some
reject single pictures or words, and the same ones at every start."""

_Extra = Literal["JSON schemas", "log-probabilities"]
_Extras = Mapping[_Extra, Mapping[str, Any]]
"""What is asked of those servers only that take it: fields of the request, by what they ask for."""


class _Try(NamedTuple):
    """One try of one request."""

    outcome: Outcome
    again: bool = False
    """Whether another try may bring something else."""
    asked_seconds: float | None = None
    """How long the server asks to wait before."""
    busy: bool = False
    """Whether all requests are to wait."""
    down: JudgeError | None = None
    """Why no request can succeed, if it stays so."""


class OpenAIJudge(Judge):
    """Asks a model behind an OpenAI-compatible server (vLLM, SGLang, `transformers serve`, a hosted one).

    Several requests are under way at a time. One that fails is a `JudgeFailure`; a server that cannot be reached, does
    not know the model or the key, fails many requests in a row or asks for too long a pause raises `JudgeError`: what
    is under way is still waited for then, and nothing new is asked. Stopped with ^C, what came in is handed on, and
    what is under way is broken off.

    Args:
        model: the model's name on the server.
        base_url: such as `http://127.0.0.1:8000/v1`; None: `OPENAI_BASE_URL`, else OpenAI's own.
        api_key_variable: the environment variable that holds the key. It is read when the judge is made, and
            nowhere written. A server given by its base URL may do without.
        concurrency: how many requests are under way at most.
        timeout_seconds: for one try of one request, from the first byte sent to the last one read.
        max_retries: further tries after a timeout, a broken connection, a 408, 409, 429 or 5xx. Before each it waits as
            long as `Retry-After` says, in seconds or as a date (after a 429 or 503 all requests do), else a pause
            that grows.
        longest_pause_seconds: a server that asks for a longer pause counts as down.
        give_up_after: after so many requests in a row without an answer the judge counts as down.
        temperature: 0 takes the likeliest tokens; None leaves it to the server (some hosted models demand that).
        token_limit_field: how the server calls the longest reply; OpenAI's reasoning models want the longer name.
        structured: have the server hold each reply to the request's JSON schema. A server that refuses a request for
            that, or for log-probabilities, is asked without from then on.
        extra_body: further fields of every request, such as `{"chat_template_kwargs": {...}}`.

    Raises:
        ConfigError: a base URL or number that cannot work.
        JudgeError: the key is needed and its variable is not set.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout_seconds: float = 120.0,
        max_retries: int = 3,
        longest_pause_seconds: float = 900.0,
        give_up_after: int = 8,
        temperature: float | None = 0.0,
        token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        structured: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        import openai

        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        check_settings(
            base_url,
            positive={"concurrency": concurrency, "give_up_after": give_up_after, "timeout_seconds": timeout_seconds},
            at_least_zero={"max_retries": max_retries, "longest_pause_seconds": longest_pause_seconds},
        )
        self.model = model
        self.concurrency, self.give_up_after = concurrency, give_up_after
        self.timeout_seconds, self.max_retries = timeout_seconds, max_retries
        self.longest_pause_seconds = longest_pause_seconds
        self._place = place_of(base_url)
        self._options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
        self._extra_body = dict(extra_body or {})
        self._structured = structured
        self._refused: set[_Extra] = set()
        self._has_answered = False
        self._key_variable = api_key_variable
        self._pause = SharedPause()
        self._token_limit_field = token_limit_field
        _let_anyio_load()
        # its own retries pass over long pauses, and its timeout starts again with every byte
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key(api_key_variable, needed=base_url is None),
            timeout=None,
            max_retries=0,
        )
        self._background: BackgroundLoop | None = None

    @property
    def id(self) -> str:
        """The model's name and the server's host and port."""
        return f"{self.model} at {self._place}"

    @property
    def cache_name(self) -> str:
        """The id, and the settings that can change an answer."""
        # hashed: it may hold what nobody should read
        extra = hashlib.sha256(json.dumps(self._extra_body, sort_keys=True).encode()).hexdigest()[:16]
        settings = [self._options, extra if self._extra_body else {}, *(["structured"] if self._structured else [])]
        return f"{self.id} {json.dumps(settings, sort_keys=True)}"

    @property
    def gives_log_probabilities(self) -> bool:
        """Whether the server has not refused them yet."""
        return "log-probabilities" not in self._refused

    def _loop(self) -> BackgroundLoop:
        if self._background is None:
            self._background = BackgroundLoop(self._client.close)
            weakref.finalize(self, self._background.close)
        return self._background

    def _replies(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, Outcome]]:
        loop, closing, health = self._loop(), asyncio.Event(), _Health(self.give_up_after)
        waiting = iter(enumerate(requests))
        under_way: dict[Future[Outcome | None], int] = {}
        down: JudgeError | None = None
        n_new = self.concurrency
        try:
            while True:
                for index, request in islice(waiting, n_new if down is None else 0):
                    under_way[loop.start(self._ask(request, messages_of(request), closing))] = index
                if not under_way:
                    break
                finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
                n_new = len(finished)
                for future in finished:
                    index, error = under_way.pop(future), future.exception()
                    outcome = None if isinstance(error, JudgeError) else future.result()
                    if outcome is not None:
                        yield index, outcome
                        self._has_answered |= isinstance(outcome, JudgeReply)
                        error = self._too_ill(health, outcome)
                    if down is None and isinstance(error, JudgeError):
                        down = error
                        # what is under way may still be answered, and is not lost; what waits to be asked again is not
                        loop.call(closing.set)
        except KeyboardInterrupt:
            yield from _come_in(under_way)
            raise
        finally:
            for future in under_way:
                future.cancel()
        if down is not None:
            raise down

    def _too_ill(self, health: _Health, outcome: Outcome) -> JudgeError | None:
        """Note an outcome, and say so where the judge counts as down after it."""
        count = health.after(outcome, has_answered=self._has_answered)
        if count is None or not isinstance(outcome, JudgeFailure):
            return None
        return self._down(f"failed {count} requests in a row: {outcome.message}")

    async def _ask(self, request: JudgeRequest, messages: list[Any], closing: asyncio.Event) -> Outcome | None:
        """Ask with all that the request wants and the server is known to take; with less where it refuses that.

        Returns:
            None where the judge went down before it was asked.

        Raises:
            JudgeError: no request can succeed.
        """
        if request.given_reply is not None:
            message = "A server of chat completions cannot say how likely given words are; a judge in this process can."
            return JudgeFailure.of(request, FailureKind.REJECTED, message)
        extras = self._extras(request)
        first = await self._tries(request, messages, extras, closing)
        if not (extras and isinstance(first, JudgeFailure) and first.kind is FailureKind.REJECTED):
            return first
        for fewer in _fewer(extras):
            outcome = await self._tries(request, messages, fewer, closing)
            if isinstance(outcome, JudgeReply):  # else it was not for these that the request was refused
                self._learn(extras.keys() - fewer.keys(), first.message)
                return outcome
        return outcome

    def _extras(self, request: JudgeRequest) -> _Extras:
        found: dict[_Extra, Mapping[str, Any]] = {}
        if self._structured and request.schema is not None:
            schema = {"name": "reply", "strict": True, "schema": json.loads(request.schema)}
            found["JSON schemas"] = {"response_format": {"type": "json_schema", "json_schema": schema}}
        if request.top_log_probabilities:
            found["log-probabilities"] = {"logprobs": True, "top_logprobs": request.top_log_probabilities}
        return {name: fields for name, fields in found.items() if name not in self._refused}

    def _learn(self, refused: set[_Extra], message: str) -> None:
        for name in sorted(refused - self._refused):
            logger.warning("%s takes no %s (%s); it is asked without.", self._place, name, message)
        self._refused |= refused

    async def _tries(
        self, request: JudgeRequest, messages: list[Any], extras: _Extras, closing: asyncio.Event
    ) -> Outcome | None:
        """Ask until there is an outcome that another try would not change, or there were enough tries.

        Raises:
            JudgeError: no request can succeed, or the server asks for too long a pause.
        """
        found: _Try | None = None
        for number in range(1, self.max_retries + 2):
            while (left := self._pause.left_seconds) > 0 and not closing.is_set():
                await _wait(closing, left)
            if closing.is_set():
                break
            found = await self._once(request, messages, extras)
            self._obey(found)
            if not found.again:
                break
            if number <= self.max_retries and not found.busy:
                await _wait(closing, growing_seconds(number) if found.asked_seconds is None else found.asked_seconds)
        if found is not None and found.down is not None:
            raise found.down
        return None if found is None else found.outcome

    def _obey(self, found: _Try) -> None:
        """Let all requests wait where the server is too busy.

        Raises:
            JudgeError: for longer than anybody wants to.
        """
        asked = found.asked_seconds
        if asked is not None and asked > self.longest_pause_seconds:
            raise JudgeError(
                f"The judge {self.id} asks for a pause of {asked:.0f} seconds, more than longest_pause_seconds="
                f"{self.longest_pause_seconds:g}. Run again after that time, or allow a longer pause: what was "
                "answered so far is kept."
            )
        if found.busy and asked is not None:
            self._pause.extend(asked)

    async def _once(self, request: JudgeRequest, messages: list[Any], extras: _Extras) -> _Try:
        """Ask once."""
        import openai

        started = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout_seconds):
                completion = await self._client.chat.completions.create(
                    model=self.model,
                    messages=messages,
                    extra_body={self._token_limit_field: request.max_new_tokens, **self._extra_body},
                    **self._options,
                    **{name: value for fields in extras.values() for name, value in fields.items()},
                )
        except (TimeoutError, openai.APITimeoutError):
            message = f"No reply from {self._place} in {self.timeout_seconds:g} seconds."
            return _Try(JudgeFailure.of(request, FailureKind.TIMEOUT, message), again=True)
        except openai.APIConnectionError as error:
            message = f"{self._place} broke off its answer ({root_of(error)})."
            refused = is_refused_connection(error)
            down = self._down(f"cannot be reached ({root_of(error)})") if refused else None
            return _Try(JudgeFailure.of(request, FailureKind.SERVER, message), again=True, down=down)
        except openai.APIStatusError as error:
            return self._turned_away(request, error, extras)
        except (openai.APIError, json.JSONDecodeError) as error:
            message = f"{self._place} sent something that is not a chat completion ({error})."
            return _Try(JudgeFailure.of(request, FailureKind.SERVER, message))
        return _Try(outcome_of(request, completion, seconds=time.monotonic() - started))

    def _turned_away(self, request: JudgeRequest, error: Any, extras: _Extras) -> _Try:  # noqa: ANN401 - openai.APIStatusError
        said, status = self._clean(said_by(error)), int(error.status_code)
        failure = JudgeFailure.of(request, status_kind(status), f"{self._place}: {said}")
        # OpenAI forbids log-probabilities of some models with a 403
        if status in (401, 404) or (status == 403 and "log-probabilities" not in extras):
            return _Try(failure, down=self._down(f"turns every request away ({said})"))
        headers = error.response.headers
        if failure.kind is not FailureKind.SERVER or headers.get("x-should-retry") == "false":
            return _Try(failure)
        asked = asked_seconds(headers, now=time.time())
        return _Try(failure, again=True, asked_seconds=asked, busy=status in _BUSY and asked is not None)

    def _clean(self, said: str) -> str:
        """What a server says, without the key, which some echo."""
        key = os.environ.get(self._key_variable)
        return said.replace(key, "[key]") if key else said

    def _down(self, what: str) -> JudgeError:
        line = " ".join(what.split())
        return JudgeError(
            f"The judge {self.id} {line}; expected an OpenAI-compatible server that knows this model. Start it or "
            "correct model, base_url and key, then run again: what was answered so far is kept."
        )


def _let_anyio_load() -> None:
    """Allow what the asynchronous client imports at its first request to be imported after nnsight.

    nnsight gives every object a method `save`; anyio refuses classes of its own that have an attribute without a type.
    """
    from anyio import TypedAttributeSet

    TypedAttributeSet.__annotations__ = {**TypedAttributeSet.__annotations__, "save": object}


class _Health:
    """Counts what remains without an answer."""

    def __init__(self, give_up_after: int) -> None:
        self.give_up_after = give_up_after
        self.in_a_row = self.rejected = 0

    def after(self, outcome: Outcome, *, has_answered: bool) -> int | None:
        """Note an outcome; give the number of failures where they are too many."""
        kind = outcome.kind if isinstance(outcome, JudgeFailure) else None
        self.in_a_row = self.in_a_row + 1 if kind in _WITHOUT_ANSWER else 0
        self.rejected += kind is FailureKind.REJECTED
        useless = not has_answered and self.rejected >= _REJECTIONS * self.give_up_after
        return max(self.in_a_row, self.rejected) if self.in_a_row >= self.give_up_after or useless else None


def _come_in(under_way: dict[Future[Outcome | None], int]) -> Iterator[tuple[int, Outcome]]:
    """Hand on what is there already."""
    for future in [one for one in under_way if one.done() and not one.cancelled() and one.exception() is None]:
        index, outcome = under_way.pop(future), future.result()
        if outcome is not None:
            yield index, outcome


def _fewer(extras: _Extras) -> Iterator[_Extras]:
    """Give what remains where some of it is left out, as little as possible first."""
    for count in range(len(extras) - 1, -1, -1):
        yield from ({name: extras[name] for name in kept} for kept in combinations(extras, count))


async def _wait(closing: asyncio.Event, seconds: float) -> None:
    """Wait for some time, or until the judge goes down."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await closing.wait()
