"""Checkpoints, learning rates and logging shared by the phases of training."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)


def rank() -> int:
    """Return the number of this process among those that train together; 0 where it trains alone."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def average_gradients(module: torch.nn.Module) -> None:
    """Average gradients over the processes that train together, if there are several."""
    if not torch.distributed.is_initialized():
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


class MuonAdam(torch.optim.Optimizer):
    """Muon for matrices and AdamW for everything else, behind one interface.

    Muon (Jordan et al., 2024) orthogonalises every update; look-ups by attention are learnt in far fewer steps.
    """

    def __init__(
        self,
        matrices: list[torch.nn.Parameter],
        others: list[torch.nn.Parameter],
        rate: float,
        *,
        seeing: Sequence[torch.nn.Parameter] = (),
        vision_rate: float = 0.0,
    ) -> None:
        """Take parameters and their top learning rates.

        Args:
            matrices: two-dimensional weights inside the layers.
            others: embeddings, norms, biases and the newline.
            rate: top learning rate of both; Muon's updates are scaled to the size of AdamW's.
            seeing: the vision tower and the projector, where they are trained too.
            vision_rate: their top learning rate.
        """
        super().__init__([*matrices, *others, *seeing], {"lr": rate})
        groups: list[dict[str, Any]] = [{"params": others, "lr": rate / 2, "weight_decay": 0.0}]
        if seeing:
            groups.append({"params": list(seeing), "lr": vision_rate, "weight_decay": 0.02})
        self._parts = (
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, betas=(0.9, 0.98)),
        )
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step both."""
        del closure
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        return {str(k): part.state_dict() for k, part in enumerate(self._parts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the states of both."""
        for k, part in enumerate(self._parts):
            part.load_state_dict(state_dict[str(k)])
        self.param_groups = [group for part in self._parts for group in part.param_groups]


@dataclass(kw_only=True)
class Phase:
    """A phase of training: what is trained, how far it is, and where it is kept."""

    name: str
    folder: Path
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    n_steps: int
    warmup_steps: int = 40
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
        average_gradients(self.module)
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        for name, value in {"loss": float(loss.detach()), **numbers}.items():
            if not math.isnan(value):
                self._numbers.setdefault(name, []).append(value)
        if rank() == 0 and self.step % 10 == 0:
            self._report()
        if rank() == 0 and (self.done or time.monotonic() - self._saved > self.save_seconds):
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
