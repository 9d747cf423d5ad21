"""Finding the value: what an MLP is to write at the constraint's last token for the target to follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.places import Constraint, constraint_ends
from sae_lens_multimodal.editing.settings import EditSettings
from sae_lens_multimodal.editing.tail import Tail, added_as_read, added_at, rewritten
from sae_lens_multimodal.editing.weights import DownProjection
from sae_lens_multimodal.errors import EditError
from sae_lens_multimodal.hooks.attribute import encoded
from sae_lens_multimodal.hooks.metrics import append_tokens, target_ids
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.types import Conversation


@dataclass(frozen=True)
class Prompts:
    """Prompts in encoded batches, and where the constraint ends in each row."""

    batches: list[EncodedBatch]
    ends: list[Int[Tensor, " batch"]]

    @classmethod
    def encode(
        cls,
        model: VisionLanguageModel,
        conversations: Sequence[Conversation],
        constraint: Constraint | Sequence[Constraint],
        batch_size: int,
    ) -> Prompts:
        """Encode conversations, so many to a batch.

        Raises:
            SelectionError: a prompt lacks the constraint.
            EditError: there is no prompt.
        """
        if not conversations:
            raise EditError("Got no prompt; expected at least one that shows or names the thing.")
        each = constraint if isinstance(constraint, Sequence) and not isinstance(constraint, str) else None
        batches, ends = [], []
        for start in range(0, len(conversations), batch_size):
            batch = encoded(model, conversations[start : start + batch_size])
            here = constraint if each is None else each[start : start + batch_size]
            batches.append(batch)
            ends.append(constraint_ends(model, batch, here))
        return cls(batches, ends)

    @torch.no_grad()
    def at_ends(self, model: VisionLanguageModel, hook_names: Sequence[str]) -> dict[str, Float[Tensor, "rows d"]]:
        """Read hooks at the constraint's last token of every prompt, in float32."""
        found: dict[str, list[Tensor]] = {name: [] for name in hook_names}
        for batch, ends in zip(self.batches, self.ends, strict=True):
            values = read_activations(model, batch, hook_names)
            for name, value in values.items():
                found[name].append(value[torch.arange(len(value)), ends.to(value.device)].float())
        return {name: torch.cat(parts) for name, parts in found.items()}


@dataclass(frozen=True, kw_only=True)
class Value:
    """What was found."""

    change: Float[Tensor, " d_out"]
    """v* minus what the MLP writes by itself."""
    length: float
    """Of the change, in units of the MLP's own output there."""
    probability_before: float
    """The target's, tokens taken together; the mean over prompts."""
    probability: float
    """The same with the change, written as the objective says."""
    steps: int
    clamped: bool
    """Whether the clamp held the change back at the end."""


def wanted_ids(model: VisionLanguageModel, target: str, *, end: bool) -> list[int]:
    """Return the target's tokens, with the end token if it is to be part of it.

    Raises:
        ConfigError: the target has no tokens, or a word the tokenizer does not know.
    """
    ids = target_ids(model, target)
    stop = model.tokenizer.eos_token_id
    return [*ids, int(stop)] if end and stop is not None else ids


class Slope(NamedTuple):
    """The loss at one point."""

    gradient: Float[Tensor, "..."]
    log_probability: Float[Tensor, " rows"]
    """The target's, for each prompt."""
    loss: float


class Objective:
    """The loss of a rewrite of one linear layer: the target's on some prompts, and how others go on."""

    def __init__(
        self,
        model: VisionLanguageModel,
        place: DownProjection,
        prompts: Prompts,
        target: Sequence[int],
        essence: Prompts | None = None,
        essence_weight: float = 0.0,
        *,
        right: Float[Tensor, " d_in"] | None = None,
        whole_layer: bool = False,
    ) -> None:
        """Run every batch once, up to the layer and beyond.

        Args:
            model: the model.
            place: the linear layer.
            prompts: those that are to be answered with the target.
            target: its tokens.
            essence: prompts whose next token is to stay.
            essence_weight: of their KL divergence.
            right: the right factor of the update to come: from the constraint on, each token then gets as much of the
                change as its key reads. Without it the constraint's last token gets all, the others nothing.
            whole_layer: whether the caller will rewrite the layer at all tokens.
        """
        device = next(model._module.parameters()).device
        self.ids = torch.tensor(list(target), device=device)
        self._module: nn.Linear = place.module
        self._prompts, self._kept_ends = prompts, essence.ends if essence is not None else []
        longer = [append_tokens(model, one, target[:-1]) if len(target) > 1 else one for one in prompts.batches]
        layer, whole = place.layer, whole_layer
        self._tails = [
            Tail(model, batch, layer, len(target), first_change=0 if whole else int(ends.min()))
            for batch, ends in zip(longer, prompts.ends, strict=True)
        ]
        kept = [] if essence is None else zip(essence.batches, essence.ends, strict=True)
        self._kept = [Tail(model, one, layer, 1, first_change=0 if whole else int(ends.min())) for one, ends in kept]
        self._weight, self._right = essence_weight, right
        self._rows = sum(len(ends) for ends in prompts.ends)

    def before(self) -> Float[Tensor, " rows"]:
        """The target's log-probability of each prompt without any rewrite."""
        return torch.cat([self._log_probability(tail.first) for tail in self._tails])

    def gradient(self, leaf: Tensor, change: Tensor | None) -> Slope:
        """The loss and its gradient.

        Args:
            leaf: of which the gradient is taken.
            change: of the value; None if the caller rewrites the layer.
        """
        total, found, whole = torch.zeros_like(leaf), [], 0.0
        for tail, ends in zip(self._tails, self._prompts.ends, strict=True):
            with torch.enable_grad():
                logs = self._log_probability(self._logits(tail, ends, change))
                loss = -logs.sum() / (self._rows * len(self.ids))
            total += torch.autograd.grad(loss, leaf)[0]
            whole += float(loss.detach())
            found.append(logs.detach())
        for tail, ends in zip(self._kept, self._kept_ends, strict=True):
            with torch.enable_grad():
                now, then = self._logits(tail, ends, change).log_softmax(-1), tail.first.log_softmax(-1)
                kept = nn.functional.kl_div(now, then, log_target=True, reduction="sum")
                loss = self._weight * kept / sum(len(one) for one in self._kept_ends)
            total += torch.autograd.grad(loss, leaf)[0]
            whole += float(loss.detach())
        return Slope(total, torch.cat(found), whole)

    def _logits(self, tail: Tail, ends: Tensor, change: Tensor | None) -> Tensor:
        if change is None:
            return tail.logits()
        right = self._right
        rewrite = added_at(ends - tail.offset, change) if right is None else added_as_read(right, change)
        with rewritten(self._module, rewrite):
            return tail.logits()

    def _log_probability(self, logits: Tensor) -> Tensor:
        ids = self.ids.to(logits.device).expand(len(logits), -1)
        return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].sum(-1)


def find_value(
    objective: Objective, own: Float[Tensor, "rows d_out"], settings: EditSettings, *, progress: bool = False
) -> Value:
    """Optimise the change of the MLP's output at the constraint's last token, the same for all prompts.

    Args:
        objective: the loss.
        own: what the MLP writes there by itself, for each prompt.
        settings: of the optimisation.
        progress: show a bar.
    """
    length = float(own.mean(0).norm())
    unit = length / own.shape[-1] ** 0.5
    x = torch.zeros(own.shape[-1], device=own.device).requires_grad_()
    adam = torch.optim.Adam([x], lr=settings.learning_rate)
    before = objective.before().exp()
    best, least, logs, steps, clamped = x.detach().clone(), float("inf"), objective.before(), 0, False
    bar = tqdm(total=settings.max_steps, desc="value", disable=not progress)
    for step in range(settings.max_steps + 1):
        change = (x.detach() * unit).requires_grad_()
        slope = objective.gradient(change, change)
        loss = slope.loss + settings.weight_decay * float(x.detach().square().mean())
        if loss <= least or step == 1:  # the start itself is no find, even where the clamp allows nothing better
            best, least, logs, steps = x.detach().clone(), loss, slope.log_probability, step
        if float(slope.log_probability.exp().min()) >= settings.enough or step == settings.max_steps:
            break
        for group in adam.param_groups:
            group["lr"] = settings.learning_rate * (1 - 0.9 * step / settings.max_steps)
        x.grad = slope.gradient * unit + settings.weight_decay * 2 * x.detach() / len(x)
        adam.step()
        clamped = _clamp(x, settings.clamp)
        bar.update()
    bar.close()
    change = best * unit
    return Value(
        change=change,
        length=float(change.norm()) / length,
        probability_before=float(before.mean()),
        probability=float(logs.exp().mean()),
        steps=steps,
        clamped=clamped,
    )


def _clamp(x: Tensor, clamp: float | None) -> bool:
    """Shorten the change to the clamp if it is longer; say whether it was."""
    longest = float("inf") if clamp is None else clamp * len(x) ** 0.5
    length = float(x.detach().norm())
    if length <= longest:
        return False
    with torch.no_grad():
        x.mul_(longest / length)
    return True
