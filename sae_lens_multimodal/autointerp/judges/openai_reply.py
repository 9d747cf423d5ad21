"""How a request is written for an OpenAI-compatible server, and how its completions and errors are read."""

from __future__ import annotations

import base64
import io
import os
from typing import TYPE_CHECKING, Any

from PIL import Image

from sae_lens_multimodal.autointerp.judges.base import (
    FailureKind,
    JudgeFailure,
    JudgeReply,
    JudgeRequest,
    Outcome,
    Part,
)
from sae_lens_multimodal.autointerp.judges.log_probabilities import tokens_of_choice

if TYPE_CHECKING:
    import openai


def messages_of(request: JudgeRequest) -> list[Any]:
    """Write a request as chat messages; pictures as PNG data URLs, so that no pixel is lost."""
    return [{"role": "user", "content": [_content(part) for part in request.parts]}]


def _content(part: Part) -> dict[str, Any]:
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


def outcome_of(request: JudgeRequest, completion: object, *, seconds: float) -> Outcome:
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
        log_probabilities=tokens_of_choice(choices[0]) if request.top_log_probabilities else None,
    )
    if refusal or getattr(choices[0], "finish_reason", None) == "content_filter":
        said = str(refusal or content or "")
        return JudgeFailure.of(request, FailureKind.REFUSED, "The judge refused to answer.", said, cost=reply)
    return reply


def _tokens(usage: object, name: str) -> int:
    """Read a number of tokens; 0 where the server says none."""
    value = getattr(usage, name, 0)
    return value if isinstance(value, int) and value > 0 else 0


def status_kind(status: int) -> FailureKind:
    """Tell a server's own errors from requests that it does not take."""
    return FailureKind.SERVER if status >= 500 or status in (408, 409, 429) else FailureKind.REJECTED


def said_by(error: openai.APIStatusError) -> str:
    """Shorten what the server said."""
    return f"HTTP {error.status_code}: {' '.join(str(error.message).split())[:300]}"


def is_refused_connection(error: BaseException) -> bool:
    """Tell whether there was no connection at all."""
    # by name: which HTTP library the client stands on has changed before
    return any(type(cause).__name__ == "ConnectError" for cause in _causes(error))


def root_of(error: BaseException) -> str:
    """Name the first cause: "Connection refused" says more than "Connection error."."""
    first = _causes(error)[-1]
    if isinstance(first, OSError) and first.errno:
        return os.strerror(first.errno)
    return str(first) or type(first).__name__


def _causes(error: BaseException) -> list[BaseException]:
    """List an error and what brought it about, the first cause last."""
    chain = [error]
    while (cause := _cause(chain[-1])) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _cause(error: BaseException) -> BaseException | None:
    """Give what brought an error about; of several at once (one an address of the server) the first."""
    if isinstance(error, BaseExceptionGroup):
        return error.exceptions[0]
    return error.__cause__ or error.__context__
