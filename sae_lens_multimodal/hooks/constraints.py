"""Constraints: the spans of a question that its answer has to meet, in the picture or in the text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from PIL import Image

from sae_lens_multimodal.adapters.encode import encode, render, special_ids
from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.adapters.prompts import parse_conversation
from sae_lens_multimodal.errors import ConfigError, PromptError
from sae_lens_multimodal.types import Box, Conversation

Kind: TypeAlias = Literal["visual", "textual"]
"""Whether the words stand for something in the picture ("this director"), or for themselves ("Golden Globe")."""

Picture: TypeAlias = "Image.Image | Path | str"


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A marked span of a question."""

    text: str
    """The words, as they stand in the question."""
    start: int
    """The first character of them in the question."""
    kind: Kind | None = "visual"
    """None where nobody has said."""
    image: int = 0
    """Of a visual one: which picture."""
    box: Box | None = None
    """Of a visual one: where in it, in pixels, where that is known."""
    meaning: str | None = None
    """What is meant, where that is known: the director's name, say."""

    @property
    def stop(self) -> int:
        """One beyond the last character."""
        return self.start + len(self.text)


@dataclass(frozen=True, kw_only=True)
class ConstrainedQuestion:
    """A question about pictures with its constraints, and its answer where that is known."""

    question: str
    constraints: tuple[Constraint, ...]
    pictures: tuple[Picture, ...] = field(default=(), repr=False)
    answer: str | None = None
    name: str = ""
    """Which row of which file, or another name."""

    def __post_init__(self) -> None:
        """Check that every constraint stands where it says.

        Raises:
            ConfigError: one does not, or is of no known kind.
        """
        for one in self.constraints:
            if self.question[one.start : one.stop] != one.text or not one.text.strip():
                raise ConfigError(
                    f"Got the constraint {one.text!r} at {one.start}; the question {self.question!r} has "
                    f"{self.question[one.start : one.stop]!r} there."
                )
            if one.kind is not None and one.kind not in get_args(Kind):
                raise ConfigError(f"Got a constraint of the kind {one.kind!r}; expected {', '.join(get_args(Kind))}.")

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The question as chat messages."""
        pictures = [
            {"type": "image", "image": one if isinstance(one, Image.Image) else str(one)} for one in self.pictures
        ]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": self.question}]}]

    def positions(self, family: Family) -> list[list[int]]:
        """The tokens of each constraint in the encoded conversation, in the order of `constraints`.

        Raises:
            PromptError: the question cannot be found in what the chat template writes.
        """
        spans = [(one.start, one.stop) for one in self.constraints]
        return span_tokens(family, self.conversation, self.question, spans)

    def replaced(self, constraint: Constraint, text: str) -> ConstrainedQuestion:
        """The same question with other words in a constraint's place; the others move along."""
        more = len(text) - len(constraint.text)
        others = []
        for one in self.constraints:
            if one == constraint:
                others.append(replace(one, text=text, box=None, meaning=None))
            else:
                others.append(replace(one, start=one.start + (more if one.start > constraint.start else 0)))
        question = self.question[: constraint.start] + text + self.question[constraint.stop :]
        return ConstrainedQuestion(question=question, constraints=tuple(others), pictures=self.pictures, name=self.name)


def mark(question: str, words: str, **about: Any) -> Constraint:  # noqa: ANN401 - the other fields
    """Mark words of a question: the first place where they stand as whole words, whatever their case.

    Raises:
        ConfigError: they do not stand there.

    Example:
        >>> mark("Name a film by this director .", "this director").start
        15
    """
    found = re.search(rf"(?<!\w){re.escape(words.strip())}(?!\w)", question, re.IGNORECASE) if words.strip() else None
    if found is None:
        raise ConfigError(f"Got the words {words!r}, which do not stand in {question!r} as whole words.")
    return Constraint(text=found.group(), start=found.start(), **about)


def span_tokens(
    family: Family, conversation: Conversation, text: str, spans: Sequence[tuple[int, int]]
) -> list[list[int]]:
    """Find the tokens of spans of a text in the encoded conversation that holds it, by the tokenizer's own offsets.

    Args:
        family: the adapter.
        conversation: one prompt, not padded.
        text: a text part of it; its last place counts.
        spans: first character, and one beyond the last, within the text.

    Raises:
        PromptError: the template changes the text, the tokenizer knows no offsets, or a span has no token.
    """
    tokenizer: Any = family.processor.tokenizer
    if not tokenizer.is_fast:
        raise PromptError("the tokenizer knows no offsets; load a model with a fast tokenizer to mark spans.")
    written = render(family, parse_conversation(conversation))
    first = written.rfind(text)
    if first < 0:
        raise PromptError(f"the chat template does not write {text!r} as it is; give it without blanks at its ends.")
    begins = tokenizer.bos_token is not None and written.startswith(tokenizer.bos_token)
    coded = tokenizer(written, return_offsets_mapping=True, add_special_tokens=not begins)
    given = encode(family, [conversation])["input_ids"][0].tolist()
    places = _matched(tokenizer, coded["input_ids"], given)
    found = []
    for start, stop in spans:
        own = [
            index
            for index, (low, high) in enumerate(coded["offset_mapping"])
            if low < first + stop and high > first + start and high > low
        ]
        if not own or any(index not in places for index in own):
            raise PromptError(f"the tokens of {text[start:stop]!r} are not among those that the model is given.")
        found.append([places[index] for index in own])
    return found


def _matched(tokenizer: Any, plain: Sequence[int], given: Sequence[int]) -> dict[int, int]:  # noqa: ANN401
    """For tokens of the written prompt their places among those that the model is given, with pictures put in."""
    special = set(special_ids(tokenizer))
    own = [index for index, token in enumerate(plain) if token not in special]
    there = [index for index, token in enumerate(given) if token not in special]
    matcher = SequenceMatcher(None, [plain[i] for i in own], [given[i] for i in there], autojunk=False)
    blocks = matcher.get_matching_blocks()
    return {own[block.a + k]: there[block.b + k] for block in blocks for k in range(block.size)}


def constraints_to_json(question: ConstrainedQuestion) -> dict[str, Any]:
    """Give a question without its pictures as JSON values."""
    return {
        "name": question.name,
        "question": question.question,
        "answer": question.answer,
        "constraints": [
            {
                "text": one.text,
                "start": one.start,
                "kind": one.kind,
                "image": one.image,
                "box": None if one.box is None else list(one.box),
                "meaning": one.meaning,
            }
            for one in question.constraints
        ],
    }


def constraints_from_json(value: Mapping[str, Any], pictures: Sequence[Picture] = ()) -> ConstrainedQuestion:
    """Read what `constraints_to_json` gave, and put the pictures back.

    Raises:
        ConfigError: a field is missing or a constraint does not stand where it says.
    """
    try:
        constraints = tuple(
            Constraint(**{**one, "box": None if one.get("box") is None else Box(*one["box"])})
            for one in value["constraints"]
        )
        question, answer = str(value["question"]), value.get("answer")
    except (KeyError, TypeError) as error:
        raise ConfigError(f"Got a question without a field that it needs ({error}).") from error
    return ConstrainedQuestion(
        question=question,
        constraints=constraints,
        pictures=tuple(pictures),
        answer=answer,
        name=str(value.get("name", "")),
    )
