"""Attention knockout: tokens that may no longer look at others, in every later run of an edited model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.iterator import Iterations
from nnsight.intervention.source import SourceNotAvailable
from torch import Tensor
from torch._guards import detect_fake_mode

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError, UnsupportedModelError
from sae_lens_multimodal.hooks.attention import check_attention
from sae_lens_multimodal.hooks.attention_calls import AttentionCall, additive, attention_module
from sae_lens_multimodal.hooks.selection import ForwardPass, Steps, Tokens, TokenSelection
from sae_lens_multimodal.hooks.trace_run import check_layers


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
    Every implementation of attention will do. One that takes no mask of one's own (flash, flex) is replaced by
    PyTorch's in the layers concerned, under the same mask less what is knocked out; other layers keep it.

    Args:
        model: The model, or an edited one.
        sources: What is no longer looked at; as `tokens` in `steer`. Positions and masks are about the prompt; names
            also mean generated tokens: `"text"` are those too.
        targets: Who no longer looks: `"last"` is the last token of the prompt and each generated one.
        layers: In which layers; None for all.
        heads: In which heads; None for all.
        steps: In which forward passes the targets are meant.

    Raises:
        ConfigError: there is no such layer or head; or, when the copy runs, it does by continuous batching.
        SelectionError: a choice can select nothing; or, when the copy runs, a target is left with nothing to look at.
        UnsupportedModelError: the model's attention does not call transformers' attention functions; or, when the copy
            runs, what its function does is not what its mask is known to mean.
    """
    numbers = sorted(set(check_layers(model, layers)))
    check_attention(model, numbers)
    count = model.hooks.resolve(f"blocks.{numbers[0]}.attn.hook_z").heads or 0
    if heads is not None and (not heads or any(not 0 <= head < count for head in heads)):
        raise ConfigError(f"Got heads={heads!r}; the model has the heads 0 to {count - 1}.")
    paths = [attention_module(model, layer) for layer in numbers]
    knockout = Knockout(
        calls=tuple((path, attention_call(model, path)) for path in paths),
        sources=TokenSelection.check(sources, "prefill" if isinstance(sources, list | Tensor) else "all", model.family),
        targets=TokenSelection.check(targets, steps, model.family),
        heads=None if heads is None else tuple(heads),
    )
    # The block names nothing else, so that this is all that a remote run of the copy has to carry.
    with model.edit() as (_, edited):
        knockout.run(edited)
    return cast("VisionLanguageModel", edited)


@dataclass(frozen=True)
class Knockout:
    """One checked knockout, as an edit replays it."""

    calls: tuple[tuple[str, str], ...]
    """The attention modules, in the order of the forward pass, and the operation within each that weighs values."""
    sources: TokenSelection
    targets: TokenSelection
    heads: tuple[int, ...] | None

    def run(self, model: VisionLanguageModel) -> None:
        """Mask attention in every forward pass of a run, from within an nnsight edit."""
        if detect_fake_mode() is not None:
            # A scan asks for shapes alone, which masks do not change.
            return
        prompt_tokens, seen, tried = 0, torch.zeros(0, 0, dtype=torch.bool), False
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
                for path, name in self.calls:
                    self._knock_out(getattr(model.get(path).source, name), forbidden, tried=tried)
                tried = True
        except OutOfOrderError:
            # The loop asks for one pass more than there is, or the run was stopped before the last of the layers.
            return

    def _knock_out(self, operation: Any, forbidden: Tensor, *, tried: bool) -> None:  # noqa: ANN401 - nnsight's own
        """Mask one layer's attention; where its function takes no mask, one that does takes its place in this call."""
        call = AttentionCall(*operation.inputs)
        given = call.given("attention_mask")
        visible = call.visible()
        plain = isinstance(given, Tensor) and given.dim() == 4
        if not tried and not plain and not call.takes_masks:
            call.check(visible)
        left = self._left(call, visible, forbidden)
        mask = additive(left, call.query)
        if plain and given.dtype != torch.bool:
            # a mask of numbers may hold more than who sees whom
            mask = torch.where(left, given[..., : call.n_keys].to(mask), mask)
        operation.inputs = call.with_mask(mask)
        if not call.takes_masks:
            operation.skip((call.output(mask), None))

    def _left(self, call: AttentionCall, visible: Tensor, forbidden: Tensor) -> Bool[Tensor, "rows heads queries keys"]:
        """Who may look at whom with the knockout."""
        closed = _fitted(forbidden, call.n_keys).to(visible.device)[:, None]
        if self.heads is not None:
            mine = torch.zeros(1, call.query.shape[1], 1, 1, dtype=torch.bool, device=visible.device)
            mine[:, list(self.heads)] = True
            closed = closed & mine
        left = visible & ~closed
        if not bool((left.any(-1) | ~visible.any(-1)).all()):
            raise SelectionError(
                "The knockout leaves a token nothing to attend to, not even itself; let targets keep some source."
            )
        return left


def attention_call(model: VisionLanguageModel, path: str) -> str:
    """The operation of an attention module that is the call of transformers' attention function.

    Raises:
        UnsupportedModelError: there is none.
    """
    try:
        names = [name for name in model.get(path).source.names if name.startswith("attention_interface_")]
    except SourceNotAvailable:
        names = []
    if not names:
        raise UnsupportedModelError(
            f"{path} of {model.name} does not call transformers' attention functions, so that its attention cannot be "
            "masked."
        )
    # those before it choose the function
    return names[-1]


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
