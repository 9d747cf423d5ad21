"""One row of a dataset, of any of the usual shapes, turned into a chat prompt with opened pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from sae_lens_multimodal.data.parts import (
    fill_pictures,
    image_part,
    message,
    normalise_messages,
    split_marks,
    text_part,
)
from sae_lens_multimodal.data.pictures import open_picture
from sae_lens_multimodal.errors import DatasetError, PromptError

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold a list of chat messages."""
IMAGE_COLUMNS = ("image", "images", "img", "picture", "jpg", "jpeg", "png", "webp")
"""Columns that hold a picture or a list of pictures."""
TEXT_COLUMNS = ("text", "texts", "caption", "captions", "txt")
"""Columns that hold text beside a picture, or text alone."""
QUESTION_COLUMNS = ("question", "query", "prompt")
"""Columns that hold a question about the picture."""
ANSWER_COLUMNS = ("answer", "answers", "response")
"""Columns that hold the answer to the question."""

USABLE_COLUMNS = (*MESSAGE_COLUMNS, *IMAGE_COLUMNS, *TEXT_COLUMNS, *QUESTION_COLUMNS)
_EXAMPLES_PER_REASON = 5


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of a dataset as a chat prompt."""

    messages: list[dict[str, Any]]
    """Chat messages as transformers spells them, the pictures within the content parts."""
    images: list[Image.Image]
    """The pictures in the order in which they occur: upright, RGB."""
    row: int
    """The index of the row in its dataset, counted from the dataset's beginning."""
    extras: dict[str, Any] = field(default_factory=dict)
    """The columns that are neither picture nor text of the prompt, such as an id."""

    @property
    def text(self) -> str:
        """All text of the prompt, with `<image>` where the pictures are; one line per message."""
        return "\n".join(
            " ".join(part["text"] if part["type"] == "text" else "<image>" for part in one["content"])
            for one in self.messages
        )


@dataclass
class SkipReport:
    """How many rows were read, kept and skipped, and why."""

    read: int = 0
    """Rows read."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows skipped, by reason."""
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """For each reason, the first few rows it met: index and message."""

    @property
    def skipped(self) -> int:
        """Rows skipped in all."""
        return self.reasons.total()

    @property
    def kept(self) -> int:
        """Rows that became prompts."""
        return self.read - self.skipped

    def skip(self, reason: str, row: int, detail: str) -> None:
        """Count a row as skipped."""
        self.reasons[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES_PER_REASON:
            examples.append((row, detail))

    def summary(self) -> str:
        """One line for people.

        Example:
            >>> report = SkipReport(read=3)
            >>> report.skip("picture cannot be opened", 1, "truncated")
            >>> report.summary()
            '3 rows read, 2 kept, 1 skipped: 1 picture cannot be opened (first: row 1, truncated)'
        """
        head = f"{self.read} rows read, {self.kept} kept, {self.skipped} skipped"
        if not self.reasons:
            return head
        reasons = []
        for reason, count in self.reasons.most_common():
            row, detail = self.examples[reason][0]
            reasons.append(f"{count} {reason} (first: row {row}, {detail})")
        return f"{head}: {'; '.join(reasons)}"

    def to_dict(self) -> dict[str, Any]:
        """The counts and examples as JSON values, for a manifest."""
        return {
            "read": self.read,
            "kept": self.kept,
            "skipped": self.skipped,
            "reasons": dict(self.reasons),
            "examples": {reason: [list(one) for one in examples] for reason, examples in self.examples.items()},
        }


def check_columns(columns: Iterable[str]) -> None:
    """Refuse a dataset none of whose columns can be used.

    Raises:
        DatasetError: naming the columns found and those that would do.
    """
    found = sorted(map(str, columns))
    if not set(found) & set(USABLE_COLUMNS):
        raise DatasetError(
            f"Found the columns {', '.join(found) or '(none)'}, none of which can be used; expected chat messages in "
            f"{_spell(MESSAGE_COLUMNS)}, pictures in {_spell(IMAGE_COLUMNS)}, or text in {_spell(TEXT_COLUMNS)}. "
            "Rename a column with dataset.rename_column(...)."
        )


def row_to_prompt(row: Mapping[str, Any], *, index: int = 0, image_folder: Path | None = None) -> Prompt:
    """Turn one row into a prompt, its pictures opened.

    The first of these shapes that the row has is taken: `messages` or `conversations` (with `image` or `images`
    columns for their picture places), `images` and `texts` interleaved, `question` and `answer`, `image` with `text`
    or `caption`, either of them alone.

    Args:
        row: The row; keys that are None count as absent.
        index: The row's index in its dataset.
        image_folder: Where relative picture paths begin; the working folder if None.

    Raises:
        DatasetError: no column of the row can be used.
        PromptError: pictures and places do not match, or a message has no usable shape.
        ImageError: a picture cannot be opened.
    """
    given = {str(key): value for key, value in row.items() if not _is_empty(value)}
    pictures = [picture for key in IMAGE_COLUMNS if key in given for picture in _as_list(given[key])]
    for columns, build in _SHAPES:
        present = [key for key in columns if key in given]
        if present:
            messages = build(given, present[0], pictures)
            break
    else:
        check_columns(row)
        raise PromptError(f"Got only empty columns in {', '.join(map(str, row))}; expected a picture or text.")
    images: list[Image.Image] = []
    for one in messages:
        for part in one["content"]:
            if part["type"] == "image":
                part["image"] = open_picture(part["image"], folder=image_folder)
                images.append(part["image"])
    extras = {key: value for key, value in given.items() if key not in USABLE_COLUMNS and key not in ANSWER_COLUMNS}
    return Prompt(messages=messages, images=images, row=index, extras=extras)


def _from_messages(given: Mapping[str, Any], key: str, pictures: list[Any]) -> list[dict[str, Any]]:
    # LLaVA's own format always marks pictures; elsewhere `<image>` is plain text unless there is a picture to place.
    marks = bool(pictures) or key != "messages"
    return fill_pictures(normalise_messages(given[key], marks=marks), _present(pictures))


def _from_texts(given: Mapping[str, Any], key: str, pictures: list[Any]) -> list[dict[str, Any]]:
    texts = _as_list(given[key])
    if any(isinstance(text, Mapping) for text in texts):
        return fill_pictures(_from_turns(texts), _present(pictures))
    if not pictures:
        return _from_image_and_text(given, key, pictures)
    if len(texts) != len(pictures):
        if len(pictures) > 1 and len(texts) > 1:
            raise PromptError(
                f"Got {len(texts)} texts and {len(pictures)} images; interleaved lists have equal lengths."
            )
        return _from_image_and_text(given, key, pictures)
    parts = []
    for text, picture in zip(texts, pictures, strict=True):
        parts += [image_part(picture)] if picture is not None else []
        parts += [text_part(text)] if text else []
    if not parts:
        raise PromptError("Got interleaved lists of nothing but empty entries; expected a picture or text.")
    return [message("user", parts)]


def _from_turns(turns: Sequence[Any]) -> list[dict[str, Any]]:
    """Question and answer turns as `{"user": ..., "assistant": ...}`."""
    pairs = [
        {"role": role, "content": turn.get(role)}
        for turn in turns
        if isinstance(turn, Mapping)
        for role in ("user", "assistant")
    ]
    return normalise_messages(pairs, marks=True)


def _from_question(given: Mapping[str, Any], key: str, pictures: list[Any]) -> list[dict[str, Any]]:
    messages = [message("user", split_marks(_first_text(given[key])))]
    answer = next((given[column] for column in ANSWER_COLUMNS if column in given), None)
    if answer is not None:
        messages.append(message("assistant", [text_part(_first_text(answer))]))
    return fill_pictures(messages, _present(pictures))


def _from_image_and_text(given: Mapping[str, Any], key: str, pictures: list[Any]) -> list[dict[str, Any]]:
    text = _first_text(given[key])
    parts = split_marks(text) if pictures else [text_part(text)]
    return fill_pictures([message("user", parts)], _present(pictures))


def _from_image(given: Mapping[str, Any], key: str, pictures: list[Any]) -> list[dict[str, Any]]:
    present = _present(pictures)
    if not present:
        raise PromptError(f"Got only empty entries in {key}; expected at least one picture.")
    return [message("user", [image_part(picture) for picture in present])]


_Builder = Callable[[Mapping[str, Any], str, list[Any]], list[dict[str, Any]]]
_SHAPES: tuple[tuple[tuple[str, ...], _Builder], ...] = (
    (MESSAGE_COLUMNS, _from_messages),
    (("texts",), _from_texts),
    (QUESTION_COLUMNS, _from_question),
    (TEXT_COLUMNS, _from_image_and_text),
    (IMAGE_COLUMNS, _from_image),
)


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def _as_list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _present(pictures: Sequence[Any]) -> list[Any]:
    return [picture for picture in pictures if picture is not None]


def _first_text(value: object) -> str:
    """The text itself, or the first of several (captions and answers often come in fives)."""
    first = next((one for one in _as_list(value) if one), "")
    if not isinstance(first, str):
        raise PromptError(f"Got text of type {type(first).__name__}; expected a string or a list of strings.")
    return first


def _spell(columns: Sequence[str]) -> str:
    return " / ".join(columns)
