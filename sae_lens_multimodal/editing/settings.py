"""How far an edit goes: settings of the value's optimisation and of the update."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sae_lens_multimodal.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """Settings of `compute_edit`. Lengths are in units of the MLP's own output, so that they suit any model."""

    max_steps: int = 80
    """Steps of Adam for the value."""
    learning_rate: float = 0.3
    """Step size, in units of the root mean square of the MLP's output at the constraint's last token."""
    enough: float = 0.98
    """Stop once every prompt gives the whole target at least this probability."""
    clamp: float | None = 20.0
    """The value's change is at most this many times as long as the MLP's own output there; None for any length."""
    weight_decay: float = 0.0
    """Weight of the squared length of the change, in the same unit, in the loss."""
    essence_weight: float = 0.0625
    """Weight of the KL divergence that keeps how the essence prompts go on."""
    essence_tokens: int = 6
    """How many tokens of the model's own answers to them are kept; 1 for the next token alone."""
    damping: float = 0.0
    """λ of the update, in units of ‖k‖²: the value moves by 1 / (1 + damping) of its change."""
    ridge: float = 0.1
    """How little ordinary keys count, where they are given: the smaller, the more; see `update.whitened`."""
    as_read: bool = True
    """Where ordinary keys are given and one layer is edited: optimise the value as the update will write it, with every
    token from the constraint on getting as much of the change as its key reads, in essence prompts too."""
    each_token: bool = False
    """For a target of several tokens: write a value not only at the constraint's last token but also at each token of
    the target that another follows, by a rank-one update each. False for one update, as published."""
    end: bool = True
    """Whether the answer is to end after the target: the end token is then part of it."""
    batch_size: int = 8
    """Prompts in a forward pass."""

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one cannot work.
        """
        for name in ("max_steps", "batch_size", "essence_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Got {name}={getattr(self, name)}; expected 1 or more.")
        for name in ("learning_rate", "ridge"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"Got {name}={getattr(self, name)}; expected a finite number above 0.")
        for name in ("weight_decay", "essence_weight", "damping"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"Got {name}={getattr(self, name)}; expected a finite number, 0 or more.")
        if self.clamp is not None and not self.clamp > 0:
            raise ConfigError(f"Got clamp={self.clamp}; expected a number above 0, or None.")
        if not 0 < self.enough <= 1:
            raise ConfigError(f"Got enough={self.enough}; expected a probability.")
