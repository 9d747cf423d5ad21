"""Checking chat messages and taking the pictures out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sae_lens_multimodal.adapters.images import open_image
from sae_lens_multimodal.errors import PromptError

ROLES = ("system", "user", "assistant", "tool")
_PICTURE_KEYS = ("image", "path", "url", "bytes")


@dataclass(frozen=True)
class ParsedPrompt:
    """One checked conversation."""

    messages: list[dict[str, Any]]
    """The messages with every content as a list of parts, pictures as bare `{"type": "image"}`."""
    images: list[Image.Image]
    """The pictures in order of appearance, opened, RGB."""

    @property
    def wants_answer(self) -> bool:
        """Whether the last message is not the assistant's."""
        return bool(self.messages[-1]["role"] != "assistant")


def parse_conversations(conversations: object) -> list[ParsedPrompt]:
    """Check one conversation or a list of them, and open their pictures.

    Args:
        conversations: `Conversation | Sequence[Conversation]`, not checked yet.

    Raises:
        PromptError: the messages have the wrong shape.
        ImageError: a picture cannot be opened.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, (str, bytes)):
        raise PromptError(
            f"got a {type(conversations).__name__} as a prompt; expected a list of chat messages "
            'such as [{"role": "user", "content": "..."}], or a list of such lists.'
        )
    if len(conversations) == 0:
        raise PromptError("got an empty list of messages; expected at least one message.")
    if isinstance(conversations[0], Mapping):
        return [parse_conversation(conversations)]
    return [parse_conversation(conversation) for conversation in conversations]


def parse_conversation(conversation: object) -> ParsedPrompt:
    """Check one conversation and open its pictures. Raises as `parse_conversations` does."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, (str, bytes)) or not conversation:
        raise PromptError(
            f"got {_shorten(conversation)} as a conversation; expected a non-empty list of chat messages "
            'such as [{"role": "user", "content": "..."}].'
        )
    images: list[Image.Image] = []
    messages = [_parse_message(message, images) for message in conversation]
    return ParsedPrompt(messages=messages, images=images)


def _parse_message(message: object, images: list[Image.Image]) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise PromptError(f"got {_shorten(message)} as a message; expected a mapping with 'role' and 'content'.")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise PromptError(f"got the role {role!r}; expected one of {', '.join(ROLES)}.")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise PromptError(f"got {_shorten(content)} as a message's content; expected a string or a list of parts.")
    return {**message, "content": [_parse_part(part, images) for part in content]}


def _parse_part(part: object, images: list[Image.Image]) -> dict[str, Any]:
    if not isinstance(part, Mapping) or "type" not in part:
        raise PromptError(f"got {_shorten(part)} as a part of a message; expected a mapping with 'type'.")
    if part["type"] == "text":
        if not isinstance(part.get("text"), str):
            raise PromptError(f"got {_shorten(part)} as a text part; expected its 'text' to be a string.")
        return {"type": "text", "text": part["text"]}
    if part["type"] == "image":
        source = next((part[key] for key in _PICTURE_KEYS if part.get(key) is not None), None)
        if source is None:
            raise PromptError(
                'got an image part without a picture; expected {"type": "image", "image": ...} '
                "with a PIL image, a path or bytes."
            )
        images.append(open_image(source))
        return {"type": "image"}
    raise PromptError(f"got a part of type {part['type']!r}; expected 'text' or 'image'.")


def _shorten(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
