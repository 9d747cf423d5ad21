"""Chat messages of the usual dialects, brought to one form: roles with text parts and picture parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sae_lens_multimodal.errors import PromptError

IMAGE_MARK = "<image>"
"""What LLaVA-style text writes where a picture belongs."""

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "developer": "system",
}
_PICTURE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")


def text_part(text: str) -> dict[str, Any]:
    """A part of text."""
    return {"type": "text", "text": text}


def image_part(reference: object = None) -> dict[str, Any]:
    """A part that is a picture; without a reference it is a place that a picture column will fill."""
    return {"type": "image", "image": reference}


def split_marks(text: str) -> list[dict[str, Any]]:
    r"""Turn text with `<image>` marks into parts; line breaks beside a mark go, as chat templates set their own.

    Example:
        >>> [part["type"] for part in split_marks("<image>\nWhat is this?")]
        ['image', 'text']
    """
    parts: list[dict[str, Any]] = []
    pieces = text.split(IMAGE_MARK)
    for index, piece in enumerate(pieces):
        if index:
            parts.append(image_part())
            piece = piece.lstrip("\n")
        if index < len(pieces) - 1:
            piece = piece.rstrip("\n")
        if piece:
            parts.append(text_part(piece))
    return parts


def message(role: str, parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A chat message as transformers spells it."""
    return {"role": role, "content": [dict(part) for part in parts]}


def normalise_messages(messages: object, *, marks: bool) -> list[dict[str, Any]]:
    """Bring a list of messages to one form.

    Understood are `role`/`content` (transformers, OpenAI) and `from`/`value` (LLaVA, ShareGPT). Keys that are there
    but None, as datasets fill them in, count as absent. Messages without any content are dropped.

    Args:
        messages: The messages, as a list of mappings.
        marks: Whether `<image>` within text stands for a picture.

    Raises:
        PromptError: no list of messages, an unknown role, or a part that is neither text nor picture.
    """
    if isinstance(messages, Mapping) and all(isinstance(column, Sequence) for column in messages.values()):
        messages = _rows_of_columns(messages)
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise PromptError(f"Got messages of type {type(messages).__name__}; expected a list of messages.")
    normal = (_normalise_message(one, marks=marks) for one in messages)
    kept = [one for one in normal if one["content"]]
    if not kept:
        raise PromptError(f"Got {len(messages)} messages without any text or picture; expected at least one with some.")
    return kept


def _rows_of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Undo the older datasets' habit of storing a list of mappings as a mapping of lists."""
    length = max((len(column) for column in columns.values()), default=0)
    if any(len(column) != length for column in columns.values()):
        raise PromptError(
            f"Got messages as columns of different lengths ({', '.join(columns)}); expected equal lengths."
        )
    return [{key: column[index] for key, column in columns.items()} for index in range(length)]


def _normalise_message(one: object, *, marks: bool) -> dict[str, Any]:
    if not isinstance(one, Mapping):
        raise PromptError(f"Got a message of type {type(one).__name__}; expected a mapping with role and content.")
    role = one.get("role") or one.get("from")
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise PromptError(f"Got a message of role {role!r}; expected one of {', '.join(sorted(_ROLES))}.")
    content = one.get("content") if one.get("content") is not None else one.get("value")
    return message(_ROLES[role.lower()], _normalise_content(content, marks=marks))


def _normalise_content(content: object, *, marks: bool) -> list[dict[str, Any]]:
    if content is None:
        return []
    if isinstance(content, str):
        return _text(content, marks=marks)
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, bytes) or not isinstance(content, Sequence):
        raise PromptError(f"Got message content of type {type(content).__name__}; expected text or a list of parts.")
    return [normal for part in content for normal in _normalise_part(part, marks=marks)]


def _normalise_part(part: object, *, marks: bool) -> list[dict[str, Any]]:
    if isinstance(part, str):
        return _text(part, marks=marks)
    if not isinstance(part, Mapping):
        raise PromptError(f"Got a content part of type {type(part).__name__}; expected a mapping with a type.")
    given = {key: value for key, value in part.items() if value is not None}
    kind = given.get("type") or ("text" if "text" in given else "image")
    if kind in ("text", "input_text"):
        # A part that declares itself text and holds none is what datasets make of a missing key.
        return _text(str(given.get("text") or given.get("content") or ""), marks=marks)
    if kind in ("image", "image_url", "input_image"):
        return [_picture_part(given)]
    raise PromptError(f"Got a content part of type {kind!r}; only text and pictures can be used.")


def _text(text: str, *, marks: bool) -> list[dict[str, Any]]:
    if marks:
        return split_marks(text)
    return [text_part(text)] if text else []


def _picture_part(given: Mapping[str, Any]) -> dict[str, Any]:
    """Find the picture of a part, wherever the dialect keeps it."""
    if "bytes" in given or ("path" in given and "image" not in given):
        return image_part({"bytes": given.get("bytes"), "path": given.get("path")})
    for key in _PICTURE_KEYS:
        if key in given:
            value = given[key]
            if key == "image_url" and isinstance(value, Mapping):
                value = value.get("url")
            return image_part(f"data:;base64,{value}" if key == "base64" else value)
    return image_part()


def fill_pictures(messages: list[dict[str, Any]], pictures: Sequence[object]) -> list[dict[str, Any]]:
    """Give the pictures of a row's columns to the places in its messages, in order.

    Without any place they go to the front of the first user message, as LLaVA's data means it; where the parts hold
    their own pictures, the columns merely repeat them and are left aside.

    Raises:
        PromptError: places and pictures do not match.
    """
    parts = [part for one in messages for part in one["content"] if part["type"] == "image"]
    places = [part for part in parts if part["image"] is None]
    if not places and (parts or not pictures):
        return messages
    if not places:
        front = [image_part(picture) for picture in pictures]
        first = next((index for index, one in enumerate(messages) if one["role"] == "user"), None)
        if first is None:
            return [message("user", front), *messages]
        filled = message("user", [*front, *messages[first]["content"]])
        return [*messages[:first], filled, *messages[first + 1 :]]
    if len(places) != len(pictures):
        raise PromptError(f"Got {len(pictures)} pictures for {len(places)} picture places; expected as many of each.")
    remaining = iter(pictures)
    return [
        message(
            one["role"],
            [
                image_part(next(remaining)) if part["type"] == "image" and part["image"] is None else part
                for part in one["content"]
            ],
        )
        for one in messages
    ]
