"""Attention knockout: tokens that may no longer look at others, in every later run of an edited model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.iterator import Iterations
from torch import Tensor
from torch._guards import detect_fake_mode

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.attention import check_attention
from sae_lens_multimodal.hooks.selection import ForwardPass, Steps, Tokens, TokenSelection
from sae_lens_multimodal.hooks.trace_run import check_layers

WITH_MASKS = ("eager", "sdpa")
"""Implementations of attention that take any mask."""


def knock_out(
    model: VisionLanguageModel,
    sources: Tokens,
    targets: Tokens,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    steps: Steps = "all",
) -> VisionLanguageModel:
    """Return an edited copy of the model in which some tokens no longer attend to others; the original stays.

    Attention is masked, as if the sources came later than the targets: what is left adds up to 1 again. The copy is
    edited in `generate`, `answer` and `trace`, with and without a cache of keys, and can be edited and steered further.

    Args:
        model: The model, or an edited one.
        sources: What is no longer looked at; as `tokens` in `steer`. Positions and masks are about the prompt; names
            also mean generated tokens: `"text"` are those too.
        targets: Who no longer looks: `"last"` is the last token of the prompt and each generated one.
        layers: In which layers; None for all.
        heads: In which heads; None for all.
        steps: In which forward passes the targets are meant.

    Raises:
        ConfigError: there is no such layer or head, or the model's attention takes no masks of one's own.
        SelectionError: a choice can select nothing; or, when the copy runs, a target is left with nothing to look at.
    """
    config = getattr(model._module.config, "text_config", model._module.config)
    implementation = config._attn_implementation
    if implementation not in WITH_MASKS:
        raise ConfigError(
            f"The model was loaded with attn_implementation={implementation!r}, which takes no mask of one's own; load "
            "it with 'sdpa' or 'eager'."
        )
    numbers = sorted(set(check_layers(model, layers)))
    check_attention(model, numbers)
    count = model.hooks.resolve(f"blocks.{numbers[0]}.attn.hook_z").heads or 0
    if heads is not None and (not heads or any(not 0 <= head < count for head in heads)):
        raise ConfigError(f"Got heads={heads!r}; the model has the heads 0 to {count - 1}.")
    knockout = Knockout(
        paths=tuple(model.hooks.resolve(f"blocks.{layer}.attn.hook_in").module_path for layer in numbers),
        sources=TokenSelection.check(sources, "prefill" if isinstance(sources, list | Tensor) else "all", model.family),
        targets=TokenSelection.check(targets, steps, model.family),
        heads=None if heads is None else tuple(heads),
        n_heads=count,
    )
    # The block names nothing else, so that this is all that a remote run of the copy has to carry.
    with model.edit() as (_, edited):
        knockout.run(edited)
    return cast("VisionLanguageModel", edited)


@dataclass(frozen=True)
class Knockout:
    """One checked knockout, as an edit replays it."""

    paths: tuple[str, ...]
    """The attention modules, in the order of the forward pass."""
    sources: TokenSelection
    targets: TokenSelection
    heads: tuple[int, ...] | None
    n_heads: int

    def run(self, model: VisionLanguageModel) -> None:
        """Mask attention in every forward pass of a run, from within an nnsight edit."""
        if detect_fake_mode() is not None:
            # A scan asks for shapes alone, which masks do not change.
            return
        prompt_tokens, seen = 0, torch.zeros(0, 0, dtype=torch.bool)
        try:
            for step in Iterations():
                forward = ForwardPass.current(model, step, prompt_tokens)
                prompt_tokens = forward.prompt_tokens
                rows, length = _shape(forward)
                keys = _or_none(self.sources.mask(forward), rows, length)
                whole = step == 0 or length >= prompt_tokens + step
                seen = keys if whole else torch.cat([seen, keys], dim=1)
                forbidden = _or_none(self.targets.mask(forward), rows, length)[:, :, None] & seen[:, None]
                if not bool(forbidden.any()):
                    continue
                for path in self.paths:
                    attention = model.get(path)
                    args, kwargs = attention.inputs
                    attention.inputs = (args, {**kwargs, "attention_mask": self._masked(args, kwargs, forbidden)})
        except OutOfOrderError:
            # The loop asks for one pass more than there is, or the run was stopped before the last of the layers.
            return

    def _masked(self, args: tuple[Any, ...], kwargs: dict[str, Any], forbidden: Tensor) -> Tensor:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
            raise ConfigError("The model's attention has a mask of an unknown kind; load it with 'sdpa' or 'eager'.")
        n_keys = forbidden.shape[-1] if mask is None else mask.shape[-1]
        closed = _fitted(forbidden, n_keys).to(hidden.device)[:, None]
        allowed = _open(mask, closed, hidden)
        if self.heads is not None:
            mine = torch.zeros(1, self.n_heads, 1, 1, dtype=torch.bool, device=hidden.device)
            mine[:, list(self.heads)] = True
            closed = closed & mine
        left = allowed & ~closed
        if not bool((left.any(-1) | ~closed.any(-1)).all()):
            raise SelectionError(
                "The knockout leaves a token nothing to attend to, not even itself; let targets keep some source."
            )
        lowest = torch.finfo(hidden.dtype).min
        bare = torch.zeros(left.shape, dtype=hidden.dtype, device=hidden.device)
        if mask is not None and mask.dtype != torch.bool:
            bare = bare + mask
        return bare.masked_fill(~left, lowest)


def _open(mask: Tensor | None, closed: Tensor, hidden: Tensor) -> Bool[Tensor, "rows 1 queries keys"]:
    """Who may look at whom without the knockout."""
    if mask is None:
        queries, keys = closed.shape[-2:]
        later = torch.arange(keys, device=hidden.device)[None] - torch.arange(queries, device=hidden.device)[:, None]
        return (later <= keys - queries)[None, None].expand(len(closed), -1, -1, -1)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.expand(len(closed), -1, -1, -1)


def _fitted(forbidden: Tensor, n_keys: int) -> Tensor:
    """Bring the keys' side to what a layer keeps: the last ones of a sliding window, or room for more."""
    more = n_keys - forbidden.shape[-1]
    return torch.nn.functional.pad(forbidden, (0, more)) if more >= 0 else forbidden[..., -n_keys:]


def _shape(forward: ForwardPass) -> tuple[int, int]:
    for name in ("input_ids", "inputs_embeds"):
        given = forward.inputs.get(name)
        if given is not None:
            return int(given.shape[0]), int(given.shape[1])
    raise SelectionError("The model was given neither token ids nor embeddings.")


def _or_none(mask: Tensor | None, rows: int, length: int) -> Bool[Tensor, "rows positions"]:
    return torch.zeros(rows, length, dtype=torch.bool) if mask is None else mask.cpu()
