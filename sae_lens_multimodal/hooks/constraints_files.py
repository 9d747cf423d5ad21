"""Reading the files of VQA-Constraints (arXiv 2406.04236): questions with a marked entity, without answers."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sae_lens_multimodal.errors import ConfigError, DatasetError
from sae_lens_multimodal.files import read_json
from sae_lens_multimodal.hooks.constraints import ConstrainedQuestion, Constraint, mark

logger = logging.getLogger(__name__)

RELEASED_ROWS = {"multimodal_known": 1204, "multimodal_movies": 3214, "okvqa": 5046}
"""Rows of each released file; 9 464 in all."""
_NEEDED = ("question", "main_entity", "image_url")
_MEANINGS = ("subject", "director")
_POINTING = re.compile(r"(this|that|these|those)\b", re.IGNORECASE)
"""How an entity begins that only the picture tells; of others the files do not say whether they are visual."""
_SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, kw_only=True)
class FileCount:
    """What one file held."""

    name: str
    rows: int
    expected: int | None
    """Rows of the released file of this name; None for another."""
    marked: int
    """Rows whose entity stands in the question as whole words."""
    answered: int
    pictures: int
    """Rows whose picture was found."""

    @property
    def line(self) -> str:
        """The count in words."""
        wanted = "" if self.expected in (None, self.rows) else f" (released: {self.expected})"
        return (
            f"{self.name}: {self.rows} rows{wanted}, {self.marked} with their entity in the question, "
            f"{self.answered} with an answer, {self.pictures} with a picture"
        )


def read_vqa_constraints(
    paths: Path | str | Iterable[Path | str],
    *,
    images: Path | str | None = None,
    answers: Mapping[str, str] | Path | str | None = None,
    check_counts: bool = True,
    say: Callable[[str], None] | None = None,
) -> list[ConstrainedQuestion]:
    """Read released files, or others of the same columns: question, main_entity, image_url, and subject or director.

    A row whose entity does not stand in its question as whole words is left out and counted.

    Args:
        paths: CSV files, or a folder of them.
        images: the folder that `image_url` is relative to; without, questions have no picture.
        answers: answers by name, such as `{"okvqa/12": "surfing"}`, or a JSON file of that: the release has none.
        check_counts: refuse a released file that has lost rows.
        say: gets one line of counts for each file; None to log them.

    Raises:
        DatasetError: a file cannot be read, lacks a column, or has not its rows.
        ConfigError: the answers name rows that there are not.
    """
    known = _answers(answers)
    found: list[ConstrainedQuestion] = []
    names: set[str] = set()
    for path in _files(paths):
        rows = _rows(path)
        expected = RELEASED_ROWS.get(path.stem)
        if check_counts and expected is not None and len(rows) != expected:
            raise DatasetError(
                f"{path} has {len(rows)} rows; the released file has {expected}. Fetch it again, or pass "
                "check_counts=False for a part of it."
            )
        read = [_question(path.stem, number, row, images, known) for number, row in enumerate(rows)]
        names.update(f"{path.stem}/{number}" for number in range(len(rows)))
        kept = [one for one in read if one is not None]
        found += kept
        count = FileCount(
            name=path.stem,
            rows=len(rows),
            expected=expected,
            marked=len(kept),
            answered=sum(one.answer is not None for one in kept),
            pictures=sum(bool(one.pictures) for one in kept),
        )
        (say or logger.info)(count.line)
    strangers = sorted(set(known) - names)
    if strangers:
        raise ConfigError(f"Got answers for {', '.join(strangers[:5])}, which are no rows; names are FILE/ROW, from 0.")
    return found


def _files(paths: Path | str | Iterable[Path | str]) -> list[Path]:
    given = [paths] if isinstance(paths, Path | str) else list(paths)
    found: list[Path] = []
    for one in map(Path, given):
        found += sorted(one.glob("*.csv")) if one.is_dir() else [one]
    if not found:
        raise DatasetError(f"Got {given}, which hold no CSV file; expected those of VQA-Constraints.")
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} cannot be read as CSV: {error}") from error
    missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        raise DatasetError(
            f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(reader.fieldnames or ())}."
        )
    return rows


def _answers(answers: Mapping[str, str] | Path | str | None) -> Mapping[str, str]:
    if answers is None or isinstance(answers, Mapping):
        return answers or {}
    read = read_json(Path(answers))
    if not isinstance(read, dict) or not all(isinstance(one, str) for one in read.values()):
        raise ConfigError(f'{answers} holds something else than answers by name, such as {{"okvqa/12": "surfing"}}.')
    return read


def _question(
    stem: str, number: int, row: Mapping[str, str], images: Path | str | None, answers: Mapping[str, str]
) -> ConstrainedQuestion | None:
    question, name = row["question"].strip(), f"{stem}/{number}"
    constraint = _constraint(question, row)
    if constraint is None:
        return None
    picture = None if images is None else _picture(Path(images), row["image_url"])
    return ConstrainedQuestion(
        question=question,
        constraints=(constraint,),
        pictures=() if picture is None else (picture,),
        answer=answers.get(name),
        name=name,
    )


def _constraint(question: str, row: Mapping[str, str]) -> Constraint | None:
    # the release leaves the comma or question mark after an entity in some rows
    words = (row["main_entity"] or "").strip().rstrip(",.?;:")
    meaning = next((row[name] for name in _MEANINGS if row.get(name)), None)
    try:
        return mark(question, words, kind="visual" if _POINTING.match(words) else None, meaning=meaning)
    except ConfigError:
        return None


def _picture(folder: Path, url: str) -> Path | None:
    base = folder / url.removeprefix("./")
    return next((path for path in (base.with_name(base.name + end) for end in _SUFFIXES) if path.is_file()), None)
