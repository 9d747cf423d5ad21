"""The baseline: the same layer's weight fine-tuned on the same prompts, within a bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.edit import DenseChange, Edit
from sae_lens_multimodal.editing.prompts import Prompts, wanted_ids
from sae_lens_multimodal.editing.tail import rewritten
from sae_lens_multimodal.editing.value import Objective
from sae_lens_multimodal.editing.weights import down_projection, fingerprint
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.types import Conversation


@dataclass(frozen=True, kw_only=True)
class FineTuneSettings:
    """Settings of `fine_tune`."""

    max_steps: int = 40
    """Steps of Adam."""
    learning_rate: float = 0.02
    """Step size, in units of the root mean square of the weight."""
    bound: float | None = 0.2
    """No entry of the weight moves further, in the same unit (the FT+L of arXiv 2202.05262); None for any distance."""
    enough: float = 0.98
    """Stop once every prompt gives the whole target at least this probability."""
    essence_weight: float = 0.5
    """Weight of the KL divergence that keeps how the essence prompts go on."""
    essence_tokens: int = 6
    """How many tokens of the model's own answers to them are kept."""
    end: bool = True
    """Whether the answer is to end after the target."""
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
        if not 0 <= self.essence_weight < math.inf:
            raise ConfigError(f"Got essence_weight={self.essence_weight}; expected a finite number, 0 or more.")
        if not 0 < self.learning_rate < math.inf or (self.bound is not None and not self.bound > 0):
            raise ConfigError(f"Got learning_rate={self.learning_rate}, bound={self.bound}; expected more than 0.")


def fine_tune(
    model: VisionLanguageModel,
    prompts: Sequence[Conversation],
    target: str,
    *,
    layer: int,
    essence: Sequence[Conversation] = (),
    settings: FineTuneSettings | None = None,
    progress: bool = False,
) -> Edit:
    """Fine-tune the down projection of one layer until prompts are answered with a target; the model is left as it was.

    Args:
        model: The model.
        prompts: Those that are to be answered with the target.
        target: The answer to be taught, of one token or several.
        layer: The layer.
        essence: Prompts whose answers are to stay as they are.
        settings: How far to go.
        progress: Show a bar.

    Raises:
        UnknownHookError, EditError, ConfigError: as `compute_edit`.
    """
    settings = settings or FineTuneSettings()
    settings.check()
    place = down_projection(model, layer)
    ids = wanted_ids(model, target, end=settings.end)
    about = Prompts.encode(model, prompts, -1, settings.batch_size).going_on_with(model, ids)
    kept = Prompts.encode(model, essence, -1, settings.batch_size) if essence else None
    others = None if kept is None else kept.going_on(model, settings.essence_tokens)
    objective = Objective(model, place, about, others, settings.essence_weight, whole_layer=True)
    weight = place.module.weight.detach()
    found, steps, probability = _descend(objective, place.module, settings, progress)
    change = DenseChange(
        path=place.path, layer=layer, fingerprint=fingerprint(weight), whole=(found - weight.float()).cpu()
    )
    record = {
        "model": model.name,
        "n_prompts": len(prompts),
        "settings": asdict(settings),
        "probability_before": float(objective.before().exp().mean()),
        "probability": probability,
        "steps": steps,
    }
    return Edit(changes=(change,), target=target, method="fine_tuning", layers=(layer,), record=record)


def _descend(
    objective: Objective, module: nn.Linear, settings: FineTuneSettings, progress: bool
) -> tuple[Tensor, int, float]:
    """Run Adam on a copy of the weight in float32, which stands in for the layer's own."""
    start = module.weight.detach().float()
    unit = float(start.square().mean().sqrt())
    copied = start.clone().requires_grad_()

    def rewrite(inputs: Tensor, output: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias.float()
        return nn.functional.linear(inputs.float(), copied, bias).to(output.dtype)

    adam = torch.optim.Adam([copied], lr=settings.learning_rate * unit)
    for step in tqdm(range(settings.max_steps), desc="fine-tuning", disable=not progress):
        with rewritten(module, rewrite):
            slope = objective.gradient(copied, None)
        logs = slope.log_probability
        if float(logs.exp().min()) >= settings.enough:
            return copied.detach(), step, float(logs.exp().mean())
        copied.grad = slope.gradient
        adam.step()
        if settings.bound is not None:
            with torch.no_grad():
                copied.clamp_(start - settings.bound * unit, start + settings.bound * unit)
    with rewritten(module, rewrite):
        logs = objective.gradient(copied, None).log_probability
    return copied.detach(), settings.max_steps, float(logs.exp().mean())
