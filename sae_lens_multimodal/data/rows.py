"""One row of a dataset, of any of the usual shapes, turned into a chat prompt with opened pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from sae_lens_multimodal.data.columns import (
    ANSWER_COLUMNS,
    IMAGE_COLUMNS,
    MESSAGE_COLUMNS,
    NESTED_COLUMN,
    QUESTION_COLUMNS,
    TEXT_COLUMNS,
    USABLE_COLUMNS,
    check_columns,
)
from sae_lens_multimodal.data.parts import (
    fill_pictures,
    image_part,
    message,
    normalise_messages,
    split_marks,
    text_part,
)
from sae_lens_multimodal.data.pictures import open_picture
from sae_lens_multimodal.data.skips import SkipReport
from sae_lens_multimodal.errors import PromptError

__all__ = ["Prompt", "SkipReport", "check_columns", "row_to_prompt"]


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
    dataset: str | None = None
    """Of a mixture, the member that the row is from; `row` then counts the rows of the mixture."""
    number: int | None = None
    """The index of the row where it is from, if it was read in another order; None if that is `row`."""

    @property
    def text(self) -> str:
        """All text of the prompt, with `<image>` where the pictures are; one line per message."""
        return "\n".join(
            " ".join(part["text"] if part["type"] == "text" else "<image>" for part in one["content"])
            for one in self.messages
        )


def row_to_prompt(
    row: Mapping[str, Any], *, index: int = 0, image_folder: Path | None = None, dataset: str | None = None
) -> Prompt:
    """Turn one row into a prompt, its pictures opened.

    The first of these shapes that the row has is taken: `messages` or `conversations` (with `image` or `images`
    columns for their picture places), `images` and `texts` interleaved, `question` and `answer`, `image` with `text`
    or `caption`, either of them alone. What a webdataset keeps in its `json` files counts as columns of the row.

    Args:
        row: The row; keys that are None count as absent.
        index: The row's index in its dataset.
        image_folder: Where relative picture paths begin; the working folder if None.
        dataset: The member of a mixture that the row is from.

    Raises:
        DatasetError: no column of the row can be used.
        PromptError: pictures and places do not match, or a message has no usable shape.
        ImageError: a picture cannot be opened.
    """
    given = {str(key): value for key, value in _flat(row).items() if not _is_empty(value)}
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
    return Prompt(messages=messages, images=images, row=index, extras=extras, dataset=dataset)


def _flat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = row.get(NESTED_COLUMN)
    if not isinstance(nested, Mapping):
        return row
    return {**nested, **{key: value for key, value in row.items() if key != NESTED_COLUMN}}


def _from_messages(given: Mapping[str, Any], key: str, pictures: list[Any]) -> list[dict[str, Any]]:
    # LLaVA's own format always marks pictures; elsewhere `<image>` is plain text unless there is a picture to place.
    marks = bool(pictures) or key != "messages"
    return fill_pictures(normalise_messages(given[key], marks=marks), _present(pictures))


def _from_texts(given: Mapping[str, Any], key: str, pictures: list[Any]) -> list[dict[str, Any]]:
    texts = _as_list(given[key])
    if any(isinstance(text, Mapping) for text in texts):
        return fill_pictures(_from_turns(texts), _present(pictures))
    if not pictures:
        # Several texts without any picture column are a document in pieces, as OBELICS keeps one.
        return [message("user", _text_parts(texts))]
    if len(texts) != len(pictures):
        if len(pictures) > 1 and len(texts) > 1:
            raise PromptError(
                f"Got {len(texts)} texts and {len(pictures)} images; interleaved lists have equal lengths."
            )
        return _from_image_and_text(given, key, pictures)
    parts = []
    for text, picture in zip(texts, pictures, strict=True):
        parts += [image_part(picture)] if picture is not None else []
        parts += _text_parts([text])
    if not parts:
        raise PromptError("Got interleaved lists of nothing but empty entries; expected a picture or text.")
    return [message("user", parts)]


def _text_parts(texts: Sequence[Any]) -> list[dict[str, Any]]:
    present = [text for text in texts if text]
    wrong = next((text for text in present if not isinstance(text, str)), None)
    if wrong is not None:
        raise PromptError(f"Got text of type {type(wrong).__name__}; expected a string or a list of strings.")
    return [text_part(text) for text in present]


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
