"""How long and how fast each phase on real pictures is trained."""

from __future__ import annotations

from typing import NamedTuple


class Plan(NamedTuple):
    """How a phase on real pictures goes."""

    name: str
    """Of the checkpoint."""
    n_steps: int
    sizes: dict[str, float]
    """Prompts a step: scene, crop, group, long, text, mixed."""
    rate: float
    """Top learning rate of the text model."""
    vision_rate: float
    """Top learning rate of the vision tower and the projector; 0 freezes them."""
    keep: float
    """Share of the tokens without an object that stay in the sequence; 1 in the end, as in real use."""
    sparse: float = 0.0
    """Share of steps, falling to none, in which only SPARSE_KEEP of those tokens stay: cheaper, and easier."""
    new_scenes: int = 0
    """Scenes of its own that no other phase has seen; 0 for those of the other phases."""


SPARSE_KEEP = 0.15
