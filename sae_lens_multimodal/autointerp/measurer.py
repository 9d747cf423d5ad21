"""What a measure is: it makes requests out of examples that the explainer never saw, and numbers out of the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np

from sae_lens_multimodal.autointerp.explanation import ModalityName
from sae_lens_multimodal.autointerp.quantiles import band_of

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeRequest, Outcome
    from sae_lens_multimodal.autointerp.selection import HeldOut
    from sae_lens_multimodal.features.example import Example

Counted: TypeAlias = Literal["wrong", "right"]
"""As what a failure counts in numbers that end in `_strict`: as wrong for an explanation, and as right for its control,
so that no failure speaks for the explanation."""

SKIPPED = "skipped: "
"""Begins the note of what cannot be measured for want of a model or an ability, and may be once there is one."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one measure found of one explanation: numbers by name."""

    values: Mapping[str, float] = field(default_factory=dict)
    """Means over the items; in a name that ends in `_strict` failures count, see `Counted`."""
    by_band: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The same for items of like activation: "top", "75-100", "50-75", "25-50", "0-25"."""
    n: int = 0
    """Items."""
    n_failed: int = 0
    """Items without a usable answer."""
    note: str = ""
    """Why there are no numbers, where there are none."""

    @property
    def is_skipped(self) -> bool:
        """Whether there was nothing to measure with."""
        return self.note.startswith(SKIPPED)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What one measure found of one feature's explanation, and of another feature's in its place."""

    feature: int
    modality: ModalityName
    measurer: str
    explanation: str
    explanation_digest: str
    found: Measured
    control: Measured | None = None
    """The same items with another feature's explanation; None where none was drawn, or the measure needs no words."""
    control_explanation: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the measure as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measure:
        """Read what `to_json` gave."""
        control = value["control"]
        return cls(
            **{
                **value,
                "found": Measured(**value["found"]),
                "control": None if control is None else Measured(**control),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a measure of one explanation wants to ask its judge, and what it makes of the outcomes."""

    finish: Callable[[Sequence[Outcome], Counted], Measured]
    """From the outcomes, in the order of the requests, to the numbers."""
    requests: Sequence[JudgeRequest] = ()


class Measurer(ABC):
    """Measures explanations on examples that the explainer never saw."""

    name: ClassVar[str]
    modalities: ClassVar[tuple[ModalityName, ...]] = ("image",)
    """What it works on; for others it says that it does not."""
    needs_words: ClassVar[bool] = True
    """Whether another feature's explanation would change the result."""
    judge: Judge | None = None
    """Who answers its requests; None for a measure that asks nobody."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as JSON values."""

    @abstractmethod
    def plan(self, text: str, examples: HeldOut, rng: np.random.Generator) -> Plan | Measured:
        """Prepare the measure of one explanation.

        Requests of many explanations are asked together, so that a judge that answers many at a time has them.

        Args:
            text: the explanation.
            examples: what the explainer never saw.
            rng: the same for the explanation and its control, so that both meet the same items.

        Returns:
            A `Measured` with a note where there is nothing to ask and nothing to find.
        """


def by_band(examples: Sequence[Example], rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Average rows of numbers over examples of like activation."""
    return by_named_band([band_of(one.kind, one.quantile) for one in examples], rows)


def by_named_band(bands: Sequence[str | None], rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Average rows of numbers over those of the same band; those of none are left out.

    Example:
        >>> by_named_band(["top", None, "top"], [{"iou": 1.0}, {"iou": 0.0}, {"iou": 0.5}])
        {'top': {'iou': 0.75}}
    """
    groups: dict[str, list[Mapping[str, float]]] = {}
    for band, row in zip(bands, rows, strict=True):
        if band is not None:
            groups.setdefault(band, []).append(row)
    return {band: averages(members) for band, members in sorted(groups.items())}


def averages(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average every number over the rows that have it.

    Example:
        >>> averages([{"iou": 0.5}, {"iou": 1.0, "hit": 1.0}])
        {'hit': 1.0, 'iou': 0.75}
    """
    names = sorted({name for row in rows for name in row})
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
