"""From characters to tokens: which tokens of an encoded prompt spell a word of its caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple, TypeAlias

from jinja2 import TemplateError

from sae_lens_multimodal.adapters.encode import render, special_ids
from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.adapters.prompts import ParsedPrompt, parse_conversation
from sae_lens_multimodal.concepts.text import find_words
from sae_lens_multimodal.errors import PromptError
from sae_lens_multimodal.types import Conversation

Role: TypeAlias = Literal["auto", "assistant", "user", "any"]
"""Whose words are the caption; `auto`: the assistant's where it speaks, all otherwise."""


class Span(NamedTuple):
    """Neighbouring tokens of a prompt, padding not counted."""

    start: int
    """The first."""
    stop: int
    """One beyond the last."""


@dataclass(frozen=True)
class Piece:
    """A text part of a conversation."""

    message: int
    part: int
    text: str


def caption_pieces(messages: Conversation, role: Role = "auto") -> list[Piece]:
    """The text parts that count as the caption, in order.

    >>> talk = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "a cat"}]
    >>> [piece.text for piece in caption_pieces(talk)]
    ['a cat']
    """
    roles = {message["role"] for message in messages}
    wanted = ("assistant" if "assistant" in roles else "any") if role == "auto" else role
    pieces = []
    for index, message in enumerate(messages):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for number, part in enumerate(parts):
            if part.get("type") == "text" and wanted in ("any", message["role"]):
                pieces.append(Piece(index, number, str(part.get("text", ""))))
    return pieces


def word_spans(
    family: Family, messages: Conversation, word: str, tokens: Sequence[int], *, role: Role = "auto"
) -> list[Span]:
    """Find the tokens that spell a word or phrase in the caption of an encoded prompt.

    The prompt is written by the chat template as for the model, one placeholder for each picture, and tokenised with
    offsets; its text tokens are then matched with those that the model is given.

    Args:
        family: the adapter.
        messages: the prompt.
        word: a word or phrase; whole words only.
        tokens: the model's `input_ids` of the prompt, padding left out.
        role: whose words are the caption.

    Returns:
        The fewest tokens that hold each occurrence, in order. Where a token goes beyond the word, as in scripts without
        blanks, two occurrences may be in one; it is there once.

    Raises:
        PromptError: the caption cannot be found in what the template writes, or the tokens do not match.
    """
    text, regions = caption_regions(family, messages, role)
    tokenizer = family.processor.tokenizer
    offsets = token_offsets(tokenizer, text)
    characters = [found for start, stop in regions for found in find_words(text, word, start, stop)]
    places = _matched(tokenizer, [token for token, _, _ in offsets], tokens)
    spans = []
    for first, end in characters:
        own = [i for i, (_, start, stop) in enumerate(offsets) if start < end and stop > first and stop > start]
        found = [places[i] for i in own if i in places]
        if not own or len(found) != len(own) or found != list(range(found[0], found[0] + len(found))):
            raise PromptError(f"the tokens of {word!r} are not among those that the model is given")
        spans.append(Span(found[0], found[-1] + 1))
    return list(dict.fromkeys(spans))


def caption_regions(family: Family, messages: Conversation, role: Role) -> tuple[str, list[tuple[int, int]]]:
    """Write a prompt as the template does, and say where in it the caption stands.

    Marks are put in the place of the caption's parts, written as well, and the text between them compared.

    Raises:
        PromptError: the template writes the parts in another way than as they are.
    """
    prompt = parse_conversation(messages)
    text = render(family, prompt)
    pieces = [piece for piece in caption_pieces(messages, role) if piece.text.strip()]
    marks = [f"zq{index}qz" for index in range(len(pieces))]
    marked = _with_marks(prompt, pieces, marks)
    try:
        rest = render(family, marked)
    except TemplateError as error:
        raise PromptError(f"the caption cannot be found in the prompt: {error}") from error
    regions, written = [], ""
    for piece, mark in zip(pieces, marks, strict=True):
        before, found, rest = rest.partition(mark)
        written += before
        content = next((one for one in (piece.text, piece.text.strip()) if text.startswith(one, len(written))), None)
        if not found or content is None:
            raise PromptError("the chat template changes the caption's text")
        regions.append((len(written), len(written) + len(content)))
        written += content
    if written + rest != text:
        raise PromptError("the chat template changes the caption's text")
    return text, regions


def _with_marks(prompt: ParsedPrompt, pieces: Sequence[Piece], marks: Sequence[str]) -> ParsedPrompt:
    messages = [{**one, "content": [dict(part) for part in one["content"]]} for one in prompt.messages]
    for piece, mark in zip(pieces, marks, strict=True):
        messages[piece.message]["content"][piece.part]["text"] = mark
    return ParsedPrompt(messages=messages, images=prompt.images)


def token_offsets(tokenizer: Any, text: str) -> list[tuple[int, int, int]]:  # noqa: ANN401 - any tokenizer
    """Tokenise a text: each token's id, its first character, and one beyond its last.

    Tokenizers that know no offsets (those not of the tokenizers library) have them worked out from how their tokens
    add up to the text; a token that ends within a character then has that character as well.
    """
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    if tokenizer.is_fast:
        found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not begins)
        return [(token, *span) for token, span in zip(found["input_ids"], found["offset_mapping"], strict=True)]
    return _counted_offsets(tokenizer, text, tokenizer(text, add_special_tokens=not begins)["input_ids"])


def _counted_offsets(tokenizer: Any, text: str, ids: Sequence[int]) -> list[tuple[int, int, int]]:  # noqa: ANN401
    special = set(special_ids(tokenizer))
    found, at = [], 0
    for token in ids:
        piece = tokenizer.convert_ids_to_tokens(token)
        own = piece if token in special else tokenizer.convert_tokens_to_string([piece])
        own = own.replace("▁", " ").removeprefix("##").strip()
        start = _next(text, own, at) if own else -1
        if start < 0:
            found.append((token, at, at))
            continue
        found.append((token, start, start + len(own)))
        at = start + len(own)
    return found


def _next(text: str, own: str, at: int) -> int:
    exact = text.find(own, at)
    loose = text.lower().find(own.lower(), at) if len(text.lower()) == len(text) else -1
    return min((one for one in (exact, loose) if one >= 0), default=-1)


def _matched(tokenizer: Any, plain: Sequence[int], given: Sequence[int]) -> dict[int, int]:  # noqa: ANN401
    """For the tokens of the plain text their places among those that the model is given.

    Pictures become many tokens there, some of them words' tokens in some families; control tokens match nothing.
    """
    special = set(special_ids(tokenizer))
    own = [index for index, token in enumerate(plain) if token not in special]
    there = [index for index, token in enumerate(given) if token not in special]
    matcher = SequenceMatcher(None, [plain[i] for i in own], [given[i] for i in there], autojunk=False)
    return {own[block.a + k]: there[block.b + k] for block in matcher.get_matching_blocks() for k in range(block.size)}
