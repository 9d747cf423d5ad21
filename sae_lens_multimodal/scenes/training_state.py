"""Checkpoints, learning rates and logging shared by the phases of training."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Phase:
    """A phase of training: what is trained, how far it is, and where it is kept."""

    name: str
    folder: Path
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    n_steps: int
    warmup_steps: int = 100
    save_seconds: float = 120.0
    step: int = 0
    _rates: list[float] = field(default_factory=list)
    _saved: float = field(default_factory=time.monotonic)
    _numbers: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Keep the top learning rates, and go on from a checkpoint if there is one."""
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        if self.path.exists():
            kept = torch.load(self.path, weights_only=True)
            self.module.load_state_dict(kept["module"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.step = kept["step"]
            logger.info("%s: going on from step %d", self.name, self.step)

    @property
    def path(self) -> Path:
        """The checkpoint, for training only."""
        return self.folder / f"{self.name}.pt"

    @property
    def done(self) -> bool:
        """Whether every step was taken."""
        return self.step >= self.n_steps

    def update(self, loss: torch.Tensor, **numbers: float) -> None:
        """Take one step: warm-up, then cosine decay to nothing; save now and then."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._factor()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        for name, value in {"loss": float(loss.detach()), **numbers}.items():
            if not math.isnan(value):
                self._numbers.setdefault(name, []).append(value)
        if self.step % 25 == 0:
            self._report()
        if self.done or time.monotonic() - self._saved > self.save_seconds:
            self.save()

    def _factor(self) -> float:
        """Share of the top learning rate at this step."""
        if self.step < self.warmup_steps:
            return (self.step + 1) / self.warmup_steps
        left = (self.n_steps - self.step) / max(1, self.n_steps - self.warmup_steps)
        return 0.5 * (1 - math.cos(math.pi * min(1.0, max(0.0, left))))

    def _report(self) -> None:
        """Log the means since the last report."""
        text = " ".join(f"{name} {sum(v) / len(v):.3f}" for name, v in sorted(self._numbers.items()))
        logger.info("%s %d/%d %s", self.name, self.step, self.n_steps, text)
        self._numbers.clear()

    def save(self) -> None:
        """Write the checkpoint in one piece."""
        self._saved = time.monotonic()
        temporary = self.path.with_suffix(".tmp")
        kept = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        torch.save(kept, temporary)
        temporary.replace(self.path)
