"""Finding the value: what an MLP is to write at the constraint's last token for the target to follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.prompts import Continued
from sae_lens_multimodal.editing.settings import EditSettings
from sae_lens_multimodal.editing.tail import Tail, added_as_read, added_at, rewritten
from sae_lens_multimodal.editing.weights import DownProjection


@dataclass(frozen=True, kw_only=True)
class Value:
    """What was found."""

    change: Float[Tensor, "places d_out"]
    """v* minus what the MLP writes by itself, at each place."""
    length: float
    """Of the longest change, in units of the MLP's own output there."""
    probability_before: float
    """The target's, tokens taken together; the mean over prompts."""
    probability: float
    """The same with the change, written as the objective says."""
    steps: int
    clamped: bool
    """Whether the clamp held the change back at the end."""


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
        prompts: Continued,
        essence: Continued | None = None,
        essence_weight: float = 0.0,
        *,
        right: Float[Tensor, "places d_in"] | None = None,
        whole_layer: bool = False,
    ) -> None:
        """Run every batch once, up to the layer and beyond.

        Args:
            model: the model.
            place: the linear layer.
            prompts: those that are to be answered with the target, which they go on with.
            essence: prompts that are to go on as they do.
            essence_weight: of their KL divergence, which is summed over an answer's tokens.
            right: the right factors of the update to come: from the constraint on, each token then gets as much of the
                changes as its key reads. Without them each place gets all of its change, other tokens nothing.
            whole_layer: whether the caller will rewrite the layer at all tokens.
        """
        self._module: nn.Linear = place.module
        self._prompts, self._essence = prompts, essence
        self._tails = _tails(model, place.layer, prompts, whole_layer)
        self._kept = [] if essence is None else _tails(model, place.layer, essence, whole_layer)
        self._weight, self._right = essence_weight, right
        self._length = prompts.tokens[0].shape[1]

    def before(self) -> Float[Tensor, " rows"]:
        """The target's log-probability of each prompt without any rewrite."""
        pairs = zip(self._tails, self._prompts.tokens, strict=True)
        return torch.cat([_log_probability(tail.first, tokens) for tail, tokens in pairs])

    def gradient(self, leaf: Tensor, change: Float[Tensor, "places d_out"] | None) -> Slope:
        """The loss and its gradient.

        Args:
            leaf: of which the gradient is taken.
            change: of the values; None if the caller rewrites the layer.
        """
        total, found, whole = torch.zeros_like(leaf), [], 0.0
        about = self._prompts
        for tail, places, tokens in zip(self._tails, about.places, about.tokens, strict=True):
            with torch.enable_grad():
                logs = _log_probability(self._logits(tail, places, change), tokens)
                loss = -logs.sum() / (about.n_rows * self._length)
            total += torch.autograd.grad(loss, leaf)[0]
            whole += float(loss.detach())
            found.append(logs.detach())
        kept = self._essence
        if kept is None:
            return Slope(total, torch.cat(found), whole)
        for tail, places, counted in zip(self._kept, kept.places, kept.counted, strict=True):
            with torch.enable_grad():
                now, then = self._logits(tail, places, change).log_softmax(-1), tail.first.log_softmax(-1)
                far = nn.functional.kl_div(now, then, log_target=True, reduction="none").sum(-1)
                loss = self._weight * far[counted.to(far.device)].sum() / kept.n_rows
            total += torch.autograd.grad(loss, leaf)[0]
            whole += float(loss.detach())
        return Slope(total, torch.cat(found), whole)

    def _logits(self, tail: Tail, places: Tensor, change: Tensor | None) -> Tensor:
        if change is None:
            return tail.logits()
        right = self._right
        rewrite = added_at(places - tail.offset, change) if right is None else added_as_read(right, change)
        with rewritten(self._module, rewrite):
            return tail.logits()


def _tails(model: VisionLanguageModel, layer: int, prompts: Continued, whole_layer: bool) -> list[Tail]:
    return [
        Tail(model, batch, layer, tokens.shape[1], first_change=0 if whole_layer else int(places.min()))
        for batch, places, tokens in zip(prompts.batches, prompts.places, prompts.tokens, strict=True)
    ]


def _log_probability(
    logits: Float[Tensor, "batch n vocabulary"], tokens: Int[Tensor, "batch n"]
) -> Float[Tensor, " batch"]:
    return logits.log_softmax(-1).gather(-1, tokens.to(logits.device)[..., None])[..., 0].sum(-1)


def find_value(
    objective: Objective, own: Float[Tensor, "rows places d_out"], settings: EditSettings, *, progress: bool = False
) -> Value:
    """Optimise the change of the MLP's output at each place, the same for all prompts.

    Args:
        objective: the loss.
        own: what the MLP writes there by itself, for each prompt.
        settings: of the optimisation.
        progress: show a bar.
    """
    length = own.mean(0).norm(dim=-1, keepdim=True)
    unit = length / own.shape[-1] ** 0.5
    x = torch.zeros(own.shape[1:], device=own.device).requires_grad_()
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
        x.grad = slope.gradient * unit + settings.weight_decay * 2 * x.detach() / x.numel()
        adam.step()
        clamped = _clamp(x, settings.clamp)
        bar.update()
    bar.close()
    change = best * unit
    return Value(
        change=change,
        length=float((change.norm(dim=-1, keepdim=True) / length).max()),
        probability_before=float(before.mean()),
        probability=float(logs.exp().mean()),
        steps=steps,
        clamped=clamped,
    )


def _clamp(x: Float[Tensor, "places d"], clamp: float | None) -> bool:
    """Shorten each change to the clamp if it is longer; say whether one was."""
    longest = float("inf") if clamp is None else clamp * x.shape[-1] ** 0.5
    lengths = x.detach().norm(dim=-1, keepdim=True)
    if not bool((lengths > longest).any()):
        return False
    with torch.no_grad():
        x.mul_((longest / lengths).clamp(max=1.0))
    return True
