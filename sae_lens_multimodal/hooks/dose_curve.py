"""What a dose-response measurement found, and the strength that it recommends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sae_lens_multimodal.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DosePoint:
    """What one strength does, as means over prompts."""

    strength: float
    """In units of the curve's `unit`."""
    value: float
    """The same as an activation; for scaling the factor."""
    target: float
    """Probability of the target."""
    others_kl: float
    """How far the other answers' shares among themselves moved, in nats, on the same prompts."""
    guard_kl: float | None
    """How far the answers to the guard prompts moved, in nats; None without guard prompts."""
    guard_changed: float | None
    """Share of the guard prompts whose likeliest next token changed."""
    answers: tuple[str, ...]
    """The likeliest next token of each prompt."""


@dataclass(frozen=True, kw_only=True)
class DoseCurve:
    """Target probability and side effects by strength."""

    points: tuple[DosePoint, ...]
    """In the order in which the strengths were given."""
    baseline: float
    """Probability of the target without steering."""
    baseline_answers: tuple[str, ...] = ()
    """The likeliest next token of each prompt without steering."""
    n_prompts: int = 0
    n_guard: int = 0
    name: str = ""
    """What was steered."""
    feature: int = 0
    kind: str = "set"
    """`set`, `add` or `scale`."""
    unit: float = 1.0
    """The activation that a strength of 1 stands for."""
    target: str = ""
    """The answer whose probability was measured."""

    def named(self, name: str, *, feature: int, kind: str, unit: float, target: str) -> DoseCurve:
        """Return the curve with what it is about."""
        return replace(self, name=name, feature=feature, kind=kind, unit=unit, target=target)

    def best(self, *, max_side_effect: float = 0.1) -> DosePoint | None:
        """Return the point with the likeliest target among those with little side effect; None where none helps.

        A point helps where the target is likelier than without steering.

        The side effect is the KL divergence of the guard prompts' answers, or of the other answers where there are no
        guard prompts, in nats. Of equals the weaker strength is taken.
        """
        mild = [
            point
            for point in self.points
            if self.side_effect(point) <= max_side_effect and point.target > self.baseline
        ]
        return max(mild, key=lambda point: (point.target, -abs(point.strength)), default=None)

    def spelt(self, point: DosePoint) -> str:
        """Return a point's strength for reading: a feature that is set to nothing is ablated."""
        return "ablated" if self.kind == "set" and point.value == 0 else f"{point.strength:g}"

    def side_effect(self, point: DosePoint) -> float:
        """Return a point's side effect, as `best` counts it."""
        return point.others_kl if point.guard_kl is None else point.guard_kl

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> DoseCurve:
        """Read what `to_dict` gave.

        Raises:
            ConfigError: it is not a curve.
        """
        try:
            points = tuple(DosePoint(**{**point, "answers": tuple(point["answers"])}) for point in record["points"])
            answers = tuple(record["baseline_answers"])
            return cls(**{**record, "points": points, "baseline_answers": answers})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"Got a record that is no dose curve ({error}); expected what to_dict gives.") from error
