"""What can be done to a feature's activation, and what that adds to the residual stream."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

import torch
from jaxtyping import Float
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
