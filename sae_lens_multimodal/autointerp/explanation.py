"""What an explanation is, what its explainer saw, and how both are kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sae_lens_multimodal.autointerp.judges.base import JudgeFailure
from sae_lens_multimodal.autointerp.prompts import short_label
from sae_lens_multimodal.autointerp.records import json_lines, lines_of_folder
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.types import Box

ModalityName: TypeAlias = Literal["image", "text"]
MODALITIES: tuple[ModalityName, ...] = ("image", "text")

EXPLANATIONS = "explanations"
"""Name of the JSONL file."""
KIND = "explanations"
"""What the manifest of its folder says."""
SCHEMA_VERSION = 1
BY_HAND = "by hand"
"""The judge of explanations that a file does not name one for."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One thing that the explainer saw."""

    prompt_id: int
    active: bool
    """Whether the feature fires there."""
    image: int | None = None
    """Which picture of the prompt, for a region."""
    box: Box | None = None
    """The region, in pixels of the original picture."""
    text: str | None = None
    """The text with its marks, for text."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Shown:
        """Read what `asdict` gave."""
        box = value.get("box")
        return cls(**{**value, "box": None if box is None else Box(*box)})


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of several explanations that were weighed, and how it did on the two halves of the validation split."""

    text: str
    label: str
    validation: float | None
    """Balanced accuracy on the items to choose by, failures counted as wrong; None where there was nothing to ask. Of
    the candidate that was chosen it is too high: that is why it was chosen."""
    confirmation: float | None = None
    """The same on items that nothing was chosen by; only of the candidate that was chosen."""
    n: int = 0
    """Items asked about."""
    n_failed: int = 0
    """Items without a usable answer."""
    round: int = 0
    """In which round it was proposed, from 0."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What one feature stands for, in the words of a model or a person."""

    feature: int
    text: str
    """The explanation; "" where the explainer found nothing in common, or failed."""
    label: str = ""
    """A few words for headings and tables."""
    modality: ModalityName = "image"
    """Whether it was made from, and is scored on, regions of pictures or text."""
    judge: str = BY_HAND
    """Who explained."""
    prompts: str = ""
    """Version of the prompt book."""
    shown: tuple[Shown, ...] = ()
    """What the explainer saw, in that order."""
    image_ids: tuple[str, ...] = ()
    """Content names of all pictures of the prompts shown or validated on."""
    failure: JudgeFailure | None = None
    """Why there is no explanation, where the explainer failed."""
    procedure: str = "general"
    """How it was made: general, contrastive or published."""
    candidates: tuple[Candidate, ...] = ()
    """All that were weighed, where there was a choice, in the order in which they were proposed."""
    validated_on: tuple[Shown, ...] = ()
    """What the choice among them was made on."""

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompts that the explainer saw or the choice was made on, each once, ascending: scores need others."""
        return tuple(sorted({one.prompt_id for one in (*self.shown, *self.validated_on)}))

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that the explainer saw or the choice was made on, with their marks: scores need others."""
        return tuple(one.text for one in (*self.shown, *self.validated_on) if one.text)

    @property
    def validation(self) -> float | None:
        """Balanced accuracy of the explanation that was kept, on items that it was not chosen by; None without any."""
        return next((one.confirmation for one in self.candidates if one.text == self.text), None)

    @property
    def digest(self) -> str:
        """Hash of the words and of all that the explainer saw: scores of it hold for no other."""
        content = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def status(self) -> Literal["explained", "nothing in common", "failed"]:
        """What came of it."""
        if self.failure is not None:
            return "failed"
        return "explained" if self.text else "nothing in common"

    def to_json(self) -> dict[str, Any]:
        """Give the explanation as JSON values; what a procedure without a choice has not, it does not mention."""
        values = {**asdict(self), "failure": self.failure.to_json() if self.failure else None}
        return {key: value for key, value in values.items() if key not in _CHOICE or value != _CHOICE[key]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Explanation:
        """Read what `to_json` gave."""
        failure = value.get("failure")
        return cls(
            **{
                **value,
                "shown": tuple(Shown.from_json(one) for one in value.get("shown", ())),
                "image_ids": tuple(value.get("image_ids", ())),
                "candidates": tuple(Candidate(**one) for one in value.get("candidates", ())),
                "validated_on": tuple(Shown.from_json(one) for one in value.get("validated_on", ())),
                "failure": None if failure is None else JudgeFailure.from_json(failure),
            }
        )


_CHOICE: Mapping[str, Any] = {"procedure": "general", "candidates": (), "validated_on": ()}
"""Fields that only a procedure with a choice fills, and what they are without one."""


def read_explanations(path: Path | str) -> list[Explanation]:
    """Read explanations: those of `explain`, or a file that a person or another program wrote.

    Args:
        path: a folder made by `explain`, or a JSONL file. Every line needs `feature` and `text`; `modality` ("image"
            where missing), `label` and `judge` are optional.

    Returns:
        All of them; none where `explain` made the folder but has no explanation yet.

    Raises:
        StoreError: the file is missing, a line has another shape, or a feature is explained twice.
    """
    path = Path(path)
    file = path / f"{EXPLANATIONS}.jsonl" if path.is_dir() else path
    lines = (
        lines_of_folder(path, EXPLANATIONS, kind=KIND, schema_version=SCHEMA_VERSION)
        if path.is_dir()
        else json_lines(path)
    )
    found: dict[tuple[int, str], Explanation] = {}
    for number, record in lines:
        explanation = _read_line(record, f"{file}, line {number}")
        key = (explanation.feature, explanation.modality)
        if key in found:
            raise StoreError(f"{file}, line {number} explains feature {key[0]} from {key[1]} again; keep one line.")
        found[key] = explanation
    return list(found.values())


def _read_line(record: Mapping[str, Any], where: str) -> Explanation:
    feature, text = record.get("feature"), record.get("text")
    if not isinstance(feature, int) or isinstance(feature, bool) or not isinstance(text, str):
        raise StoreError(f'{where}: expected at least {{"feature": a number, "text": a string}}, got {dict(record)}.')
    if record.get("modality", "image") not in MODALITIES:
        raise StoreError(f"{where}: modality is {record['modality']!r}; expected 'image' or 'text'.")
    try:
        return Explanation.from_json({"label": short_label(text), **record})
    except (TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{where}: not an explanation ({error}).") from error
