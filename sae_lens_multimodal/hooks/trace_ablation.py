"""Token ablation: tokens replaced by zero or by a mean, in every later run of an edited model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_multimodal.adapters.hook_points import HookPoint
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.attribute import Prompts, chosen_tokens, encoded
from sae_lens_multimodal.hooks.gradients import check_language_hook
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.selection import Steps, Tokens, TokenSelection
from sae_lens_multimodal.hooks.steering import Steering

Replacement: TypeAlias = "Literal['zero', 'mean'] | Tensor"
"""Zero, the mean of the row's own chosen tokens, or a vector such as `mean_activation` gives."""

HOOK = "blocks.0.hook_resid_pre"
"""What enters the first block: words and patches, before anything is read from them."""


@dataclass(frozen=True)
class Replaced:
    """What is put in the place of tokens at one hook."""

    hook: HookPoint
    by: Replacement

    @property
    def n_prompts(self) -> int | None:
        """All rows are treated alike."""
        return None

    def steered(self, value: Tensor, mask: Bool[Tensor, "batch seq"] | None) -> Tensor:
        """Replace the chosen positions, None for all; heads count as one dimension."""
        flat = (value.flatten(2) if value.dim() > 3 else value).clone()
        chosen = torch.ones(flat.shape[:2], dtype=torch.bool) if mask is None else mask
        chosen = chosen.to(flat.device)
        if isinstance(self.by, Tensor):
            flat[chosen] = self.by.to(flat)
        elif self.by == "zero":
            flat[chosen] = 0
        else:
            for row, mine in enumerate(chosen):
                if bool(mine.any()):
                    flat[row, mine] = flat[row, mine].float().mean(0).to(flat)
        return flat.reshape(value.shape)


def ablate_tokens(
    model: VisionLanguageModel,
    tokens: Tokens,
    *,
    to: Replacement = "mean",
    hook_name: str = HOOK,
    steps: Steps = "prefill",
) -> VisionLanguageModel:
    """Return an edited copy of the model in which some tokens carry nothing of their own; the original stays.

    Args:
        model: The model, or an edited one.
        tokens: Which; as in `steer`: `"image"`, `BoxTokens(box)`, positions, …
        to: `"zero"`; `"mean"`, of the same tokens of the same row, so that what they share stays and what tells them
            apart goes; or a vector, such as a mean over other prompts by `mean_activation`.
        hook_name: Where; by default what enters the first block.
        steps: In which forward passes.

    Raises:
        ConfigError: `to` is none of these, or not as wide as the hook.
        SelectionError: the tokens can select nothing, or the hook sees pictures.
        UnknownHookError: the model has no such hook.
    """
    hook = model.hooks.resolve(hook_name)
    check_language_hook(model, hook.name)
    if not isinstance(to, Tensor) and to not in ("zero", "mean"):
        raise ConfigError(f"Got to={to!r}; expected 'zero', 'mean' or a vector.")
    if isinstance(to, Tensor) and (to.dim() != 1 or (hook.d is not None and len(to) != hook.d)):
        raise ConfigError(f"Got a vector of shape {tuple(to.shape)}; {hook.name} has width {hook.d}.")
    ablation = Steering((Replaced(hook, to),), TokenSelection.check(tokens, steps, model.family), whole=False)
    return _edit(model, ablation)


def _edit(model: VisionLanguageModel, steering: Steering) -> VisionLanguageModel:
    # The block names nothing else, so that this is all that a remote run of the copy has to carry.
    with model.edit() as (_, edited):
        steering.run(edited)
    return cast("VisionLanguageModel", edited)


@torch.no_grad()
def mean_activation(
    model: VisionLanguageModel, prompts: Sequence[Prompts], *, tokens: Tokens = "image", hook_name: str = HOOK
) -> Float[Tensor, " width"]:
    """The mean of a hook over the chosen tokens of many prompts, each token counted once, in float32.

    Raises:
        SelectionError: there are no prompts, or a prompt has no such tokens.
    """
    if not prompts:
        raise SelectionError("Got no prompts; expected at least one to take the mean of.")
    total, count = torch.zeros(()), 0
    for one in prompts:
        batch = encoded(model, one)
        mask = chosen_tokens(model, batch, batch, tokens)
        value = read_activations(model, batch, hook_name)[hook_name]
        value = value.flatten(2) if value.dim() > 3 else value
        total = total + value[mask.to(value.device)].float().sum(0).cpu()
        count += int(mask.sum())
    return total / count
