"""A judge behind an OpenAI-compatible server, asked through the official client."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from PIL import Image

from sae_lens_multimodal.autointerp.judges.base import (
    FailureKind,
    Judge,
    JudgeFailure,
    JudgeReply,
    JudgeRequest,
    Outcome,
    Part,
)
from sae_lens_multimodal.autointerp.judges.pause import SharedPause
from sae_lens_multimodal.errors import ConfigError, JudgeError

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

HOSTED = "api.openai.com"
"""Where the client goes when no base URL is given."""

_WITHOUT_ANSWER = frozenset({FailureKind.SERVER, FailureKind.TIMEOUT})
_REJECTIONS = 10
"""A server that has answered nothing yet may reject so many times more requests than it may leave unanswered: some
reject single pictures or words, and the same ones at every start."""


class OpenAIJudge(Judge):
    """Asks a model behind an OpenAI-compatible server (vLLM, SGLang, `transformers serve`, a hosted one).

    Several requests are under way at a time.

    One request that fails is a `JudgeFailure`; a server that cannot be reached, does not know the model or the key,
    or fails many requests in a row raises `JudgeError`.

    Args:
        model: the model's name on the server.
        base_url: such as `http://127.0.0.1:8000/v1`; None: `OPENAI_BASE_URL`, else OpenAI's own.
        api_key_variable: the environment variable that holds the key. It is read when the judge is made, and
            nowhere written. A server given by its base URL may do without.
        concurrency: how many requests are under way at most.
        timeout_seconds: for one try of one request.
        max_retries: further tries after a timeout, a 429 or a 5xx, with growing pauses (by the client). After a 429 all
            requests wait as long as it asks for.
        give_up_after: after so many requests in a row without an answer the judge counts as down.
        temperature: 0 takes the likeliest tokens; None leaves it to the server (some hosted models demand that).
        token_limit_field: how the server calls the longest reply; OpenAI's reasoning models want the longer name.
        structured: have the server hold each reply to the request's JSON schema. A server that refuses a request for
            that is asked without from then on.
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
        give_up_after: int = 8,
        temperature: float | None = 0.0,
        token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        structured: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        import openai

        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        _check_settings(base_url, concurrency, timeout_seconds, give_up_after)
        self.model = model
        self.concurrency = concurrency
        self.give_up_after = give_up_after
        self._place = _place(base_url)
        self._options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
        self._extra_body = dict(extra_body or {})
        self._structured, self._takes_schemas = structured, structured
        self._has_answered = False
        self._key_variable = api_key_variable
        pause = SharedPause()
        http = openai.DefaultHttpxClient(event_hooks={"request": [pause.wait], "response": [pause.note]})
        self._token_limit_field = token_limit_field
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=_api_key(api_key_variable, needed=base_url is None),
            timeout=timeout_seconds,
            max_retries=max_retries,
            http_client=http,
        )
        weakref.finalize(self, http.close)

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

    def _replies(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, Outcome]]:
        waiting = iter(enumerate(requests))
        failed_in_a_row, rejected, down = 0, 0, None
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge") as pool:
            under_way = {pool.submit(self._ask, request): index for index, request in islice(waiting, self.concurrency)}
            while under_way:
                finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in finished:
                    index, error = under_way.pop(future), future.exception()
                    if isinstance(error, JudgeError):
                        down = down or error
                        continue
                    outcome = future.result()
                    yield index, outcome
                    self._has_answered |= not isinstance(outcome, JudgeFailure)
                    failed_in_a_row = failed_in_a_row + 1 if _without_answer(outcome) else 0
                    rejected += isinstance(outcome, JudgeFailure) and outcome.kind is FailureKind.REJECTED
                    useless = not self._has_answered and rejected >= _REJECTIONS * self.give_up_after
                    if (failed_in_a_row >= self.give_up_after or useless) and isinstance(outcome, JudgeFailure):
                        count = max(failed_in_a_row, rejected)
                        down = down or self._down(f"failed {count} requests in a row: {outcome.message}")
                # what is under way when the judge goes down may still be answered, and is not lost
                new = islice(waiting, len(finished) if down is None else 0)
                under_way |= {pool.submit(self._ask, request): index for index, request in new}
        if down is not None:
            raise down

    def _ask(self, request: JudgeRequest) -> Outcome:
        """Ask with the request's schema if the server takes such, else without.

        Raises:
            JudgeError: no request can succeed.
        """
        if not (self._takes_schemas and request.schema is not None):
            return self._try(request, {})
        schema = {"name": "reply", "strict": True, "schema": json.loads(request.schema)}
        outcome = self._try(request, {"response_format": {"type": "json_schema", "json_schema": schema}})
        if not (isinstance(outcome, JudgeFailure) and outcome.kind is FailureKind.REJECTED):
            return outcome
        plain = self._try(request, {})
        if isinstance(plain, JudgeReply):  # else it was not for the schema that the request was refused
            self._takes_schemas = False
            logger.warning("%s takes no JSON schemas (%s); it is asked without.", self._place, outcome.message)
        return plain

    def _try(self, request: JudgeRequest, further: Mapping[str, Any]) -> Outcome:
        """Ask once (the client retries).

        Raises:
            JudgeError: no request can succeed.
        """
        import openai

        started = time.monotonic()
        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": [_content(part) for part in request.parts]}],
                extra_body={self._token_limit_field: request.max_new_tokens, **self._extra_body},
                **self._options,
                **further,
            )
        except openai.APITimeoutError as error:
            return JudgeFailure.of(request, FailureKind.TIMEOUT, f"No reply from {self._place} in time ({error}).")
        except openai.APIConnectionError as error:
            # by name: which HTTP library the client stands on has changed before
            if any(type(cause).__name__ == "ConnectError" for cause in _causes(error)):
                raise self._down(f"cannot be reached ({_root(error)})") from error
            message = f"{self._place} broke off its answer ({_root(error)})."
            return JudgeFailure.of(request, FailureKind.SERVER, message)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self._down(f"turns every request away ({self._clean(_said(error))})") from error
        except openai.APIStatusError as error:
            said = self._clean(_said(error))
            return JudgeFailure.of(request, _status_kind(error.status_code), f"{self._place}: {said}")
        except (openai.APIError, json.JSONDecodeError) as error:
            message = f"{self._place} sent something that is not a chat completion ({error})."
            return JudgeFailure.of(request, FailureKind.SERVER, message)
        return _outcome(request, completion, seconds=time.monotonic() - started)

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


def _outcome(request: JudgeRequest, completion: object, *, seconds: float) -> Outcome:
    """Read a completion, whatever shape the server gave it."""
    from openai.types.chat import ChatCompletion

    choices = completion.choices if isinstance(completion, ChatCompletion) else None
    if not isinstance(choices, list):
        message = f"The server sent {type(completion).__name__} without choices; expected a chat completion."
        return JudgeFailure.of(request, FailureKind.SERVER, message, str(completion)[:2000])
    # the client checks no types: any field of any part may be anything
    message_of = getattr(choices[0], "message", None) if choices else None
    content, refusal = getattr(message_of, "content", None), getattr(message_of, "refusal", None)
    if message_of is None or not isinstance(content, str | None):
        return JudgeFailure.of(request, FailureKind.EMPTY, "The server's completion has no message.")
    usage = getattr(completion, "usage", None)
    reply = JudgeReply(
        text=content or "",
        tokens_in=_tokens(usage, "prompt_tokens"),
        tokens_out=_tokens(usage, "completion_tokens"),
        seconds=seconds,
    )
    if refusal or getattr(choices[0], "finish_reason", None) == "content_filter":
        said = str(refusal or content or "")
        return JudgeFailure.of(request, FailureKind.REFUSED, "The judge refused to answer.", said, cost=reply)
    return reply


def _tokens(usage: object, name: str) -> int:
    """Read a number of tokens; 0 where the server says none."""
    value = getattr(usage, name, 0)
    return value if isinstance(value, int) and value > 0 else 0


def _content(part: Part) -> Any:  # noqa: ANN401 - one of the client's many typed dicts
    """Give one part as the server wants it; pictures as PNG data URLs, so that no pixel is lost."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": png_data_url(part)}}


def png_data_url(picture: Image.Image) -> str:
    """Spell a picture as a `data:` URL.

    Example:
        >>> png_data_url(Image.new("RGB", (1, 1)))[:30]
        'data:image/png;base64,iVBORw0K'
    """
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _check_settings(base_url: str | None, concurrency: int, timeout_seconds: float, give_up_after: int) -> None:
    if base_url is not None and urlsplit(base_url).scheme not in ("http", "https"):
        raise ConfigError(f"base_url is {base_url!r}; expected a URL such as 'http://127.0.0.1:8000/v1'.")
    if concurrency < 1 or give_up_after < 1 or timeout_seconds <= 0:
        raise ConfigError(
            f"concurrency={concurrency}, give_up_after={give_up_after}, timeout_seconds={timeout_seconds}; "
            "each must be greater than 0."
        )


def _place(base_url: str | None) -> str:
    """Name the server without path and credentials."""
    if base_url is None:
        return HOSTED
    parts = urlsplit(base_url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def _api_key(variable: str, *, needed: bool) -> str:
    key = os.environ.get(variable)
    if key:
        return key
    if needed:
        raise JudgeError(
            f"The environment variable {variable} is not set; expected the API key of {HOSTED} there. Set it, or give "
            "the base_url of a server that needs none."
        )
    return "none"


def _without_answer(outcome: Outcome) -> bool:
    return isinstance(outcome, JudgeFailure) and outcome.kind in _WITHOUT_ANSWER


def _status_kind(status: int) -> FailureKind:
    return FailureKind.SERVER if status >= 500 or status == 429 else FailureKind.REJECTED


def _said(error: openai.APIStatusError) -> str:
    """Shorten what the server said."""
    return f"HTTP {error.status_code}: {' '.join(str(error.message).split())[:300]}"


def _causes(error: BaseException) -> list[BaseException]:
    """List an error and what brought it about, the first cause last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _root(error: BaseException) -> str:
    """Name the first cause: "Connection refused" says more than "Connection error."."""
    first = _causes(error)[-1]
    return str(first) or type(first).__name__
