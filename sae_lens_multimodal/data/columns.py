"""The columns of a dataset that can be used, by what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sae_lens_multimodal.errors import DatasetError

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
NESTED_COLUMN = "json"
"""The column in which a webdataset keeps the content of its `.json` files: columns within a column."""

USABLE_COLUMNS = (*MESSAGE_COLUMNS, *IMAGE_COLUMNS, *TEXT_COLUMNS, *QUESTION_COLUMNS)


def check_columns(columns: Iterable[str]) -> None:
    """Refuse a dataset none of whose columns can be used.

    Raises:
        DatasetError: naming the columns found and those that would do.
    """
    found = sorted(map(str, columns))
    if not set(found) & {*USABLE_COLUMNS, NESTED_COLUMN}:
        raise DatasetError(
            f"Found the columns {', '.join(found) or '(none)'}, none of which can be used; expected chat messages in "
            f"{_spell(MESSAGE_COLUMNS)}, pictures in {_spell(IMAGE_COLUMNS)}, or text in {_spell(TEXT_COLUMNS)}. "
            "Rename a column with dataset.rename_column(...)."
        )


def _spell(columns: Sequence[str]) -> str:
    return " / ".join(columns)
