"""What can be done to a feature's activation, and what that adds to the residual stream."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multimodal.errors import ConfigError


@dataclass(frozen=True)
class Set:
    """The feature's activation becomes this value."""

    value: float


@dataclass(frozen=True)
class Add:
    """This value is added to the feature's activation, whether the feature is active or not."""

    value: float


@dataclass(frozen=True)
class Scale:
    """The feature's activation is multiplied by this factor; where it is inactive nothing happens."""

    factor: float


@dataclass(frozen=True)
class Ablate:
    """The feature's activation becomes 0."""


Change: TypeAlias = "Set | Add | Scale | Ablate"
"""One of the four things that can be done to a feature."""


def check_changes(changes: Mapping[int, Change]) -> None:
    """Check that every change is one, and its strength a finite number.

    Raises:
        ConfigError: it is not.
    """
    for feature, change in changes.items():
        if not isinstance(change, Set | Add | Scale | Ablate):
            raise ConfigError(
                f"Got {change!r} for feature {feature}; expected Set(...), Add(...), Scale(...) or Ablate()."
            )
        strength = _strength(change)
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
            raise ConfigError(f"Got {change!r} for feature {feature}; expected a finite number.")


def _strength(change: Change) -> float:
    match change:
        case Set(value) | Add(value):
            return value
        case Scale(factor):
            return factor
        case Ablate():
            return 0.0
        case _:
            assert_never(change)


FeatureChanges: TypeAlias = "Mapping[int, Change] | Sequence[Mapping[int, Change]]"
"""What to do to which feature; in a list, one for each row of the batch."""


def row_changes(changes: FeatureChanges) -> tuple[Mapping[int, Change], ...]:
    """Return the changes of each row; one for all rows where they are not told apart.

    Raises:
        ConfigError: they are neither a mapping nor mappings.
    """
    rows: object = (changes,) if isinstance(changes, Mapping) else changes
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not rows:
        raise ConfigError(
            f"Got changes {changes!r}; expected {{feature: change}}, or a list with one such mapping for each row."
        )
    for row in rows:
        if not isinstance(row, Mapping):
            raise ConfigError(f"Got {row!r} as the changes of a row; expected {{feature: change}}.")
    return tuple(rows)


@dataclass(frozen=True)
class RowTable:
    """Changes that differ by row, as z' - z = slope * z + offset: one number for each row and feature."""

    features: tuple[int, ...]
    """Every feature that any row changes."""
    slope: Float[Tensor, "rows features"]
    offset: Float[Tensor, "rows features"]

    @classmethod
    def of(cls, rows: Sequence[Mapping[int, Change]]) -> RowTable:
        """Write changes as numbers.

        Example:
            >>> table = RowTable.of([{5: Set(8.0)}, {7: Scale(3.0)}])
            >>> table.features, table.slope.tolist(), table.offset.tolist()
            ((5, 7), [[-1.0, 0.0], [0.0, 2.0]], [[8.0, 0.0], [0.0, 0.0]])
        """
        features = tuple(dict.fromkeys(feature for row in rows for feature in row))
        pairs = [[_line(row.get(feature)) for feature in features] for row in rows]
        numbers = torch.tensor(pairs, dtype=torch.float64).reshape(len(rows), len(features), 2)
        return cls(features, numbers[..., 0], numbers[..., 1])

    @property
    def needs_encoding(self) -> bool:
        """Whether the changes depend on the features' activations."""
        return bool(self.slope.any())

    def deltas(
        self, encoded: Float[Tensor, "tokens features"], rows: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens features"]:
        """How much each feature's activation changes at each token, which belongs to one of the rows."""
        slope, offset = (
            table.to(encoded.device, encoded.dtype)[rows.to(encoded.device)] for table in (self.slope, self.offset)
        )
        return slope * encoded + offset


def _line(change: Change | None) -> tuple[float, float]:
    match change:
        case None:
            return 0.0, 0.0
        case Set(value):
            return -1.0, float(value)
        case Add(value):
            return 0.0, float(value)
        case Scale(factor):
            return factor - 1.0, 0.0
        case Ablate():
            return -1.0, 0.0
        case _:
            assert_never(change)


def feature_deltas(
    changes: Sequence[Change], encoded: Float[Tensor, "tokens features"]
) -> Float[Tensor, "tokens features"]:
    """How much each feature's activation changes, column by column.

    Written as differences, so that `Add(0)` and `Scale(1)` give exact zeros.

    Example:
        >>> feature_deltas([Set(8.0), Add(1.0), Scale(3.0), Ablate()], torch.tensor([[2.0, 2.0, 2.0, 2.0]])).tolist()
        [[6.0, 1.0, 4.0, -2.0]]
    """
    columns = [_delta(change, encoded[:, index]) for index, change in enumerate(changes)]
    return torch.stack(columns, dim=-1) if columns else encoded[:, :0]


def _delta(change: Change, encoded: Tensor) -> Tensor:
    match change:
        case Set(value):
            return value - encoded
        case Add(value):
            return torch.full_like(encoded, value)
        case Scale(factor):
            return (factor - 1.0) * encoded
        case Ablate():
            return -encoded
        case _:
            assert_never(change)


def needs_encoding(changes: Sequence[Change]) -> bool:
    """Whether the changes depend on the features' activations; adding does not."""
    return any(not isinstance(change, Add) for change in changes)
