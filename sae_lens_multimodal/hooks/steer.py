"""Steering: SAE features set, added to, scaled or ablated in every later run of an edited model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from nnsight.intervention.interleaver import OutOfOrderError
from sae_lens import SAE
from torch import Tensor
from torch._guards import detect_fake_mode

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.changes import (
    Ablate,
    Add,
    Change,
    Scale,
    Set,
    check_changes,
    feature_deltas,
    needs_encoding,
)
from sae_lens_multimodal.hooks.saes import (
    check_features,
    check_sae,
    decoder_directions,
    encode_tokens,
    inference_sae,
    output_scale,
    reconstruct_tokens,
)
from sae_lens_multimodal.hooks.selection import ForwardPass, StepName, Tokens, TokenSelection

__all__ = ["Ablate", "Add", "Change", "Scale", "Set", "steer", "steer_tokens"]

ErrorTerm: TypeAlias = Literal["keep", "drop"]
"""What becomes of the part that the SAE does not reconstruct."""


def steer(
    model: VisionLanguageModel,
    sae: SAE[Any],
    changes: Mapping[int, Change],
    *,
    tokens: Tokens = "all",
    steps: StepName = "all",
    hook_name: str | None = None,
    error: ErrorTerm = "keep",
) -> VisionLanguageModel:
    """Return an edited copy of the model in which SAE features are changed; the original stays as it was.

    At the chosen tokens the hook's value x becomes x + (z' - z)·W_dec, where z are the SAE's feature activations and
    z' those after the changes: what the SAE does not reconstruct is kept. With `error="drop"` x becomes the
    reconstruction from z' instead. Everything else is left bit for bit. The copy shares the weights; it is steered in
    `generate`, `answer`, `trace` and everything that runs through them, in every batch, and can be steered again.

    Args:
        model: The model, or a steered one: changes then follow one another.
        sae: The SAE whose features are meant.
        changes: What to do to which feature: `Set(8.0)`, `Add(2.0)`, `Scale(0.5)` or `Ablate()`.
        tokens: Where: `"all"` tokens but padding, `"image"` patches, `"text"` without control tokens, the `"last"`
            token of each row; a mask [batch, seq] or [seq] or positions (negative ones count from the end), both of
            the prompt; or a function from a forward pass's `TokenLayout` to a mask.
        steps: When: in `"all"` forward passes, only in the `"prefill"` over the prompt, or only while `"decoding"`.
            Generated tokens are text. Masks and positions are about the prompt only.
        hook_name: The hook; None for the one the SAE was trained on. One outside of the language model has no tokens,
            so it takes `tokens="all"` only, which is then every position.
        error: Whether to keep what the SAE does not reconstruct.

    Raises:
        FeatureError: the SAE has no such feature.
        ConfigError: a change is none of the four, or its strength is not a finite number.
        SAEMismatchError: the SAE does not fit the hook.
        SelectionError: the choice of tokens selects nothing, as far as that is known; what depends on the prompt is
            raised when the copy runs.
        UnknownHookError: the model has no such hook.
    """
    name = check_sae(model, sae, hook_name)
    features = check_features(sae, list(changes))
    check_changes(changes)
    if error not in get_args(ErrorTerm):
        raise ConfigError(f"Got error={error!r}; expected 'keep' or 'drop'.")
    selection = TokenSelection.check(tokens, steps, model.family)
    whole = model.hooks.resolve(name).tower != "language"
    if whole and not (isinstance(tokens, str) and tokens == "all" and steps != "decoding"):
        raise SelectionError(
            f"{name} sees pictures, not tokens, and runs before any is generated; expected tokens='all' and "
            "steps='all' or 'prefill'."
        )
    steering = Steering(
        hook_name=name,
        sae=inference_sae(sae),
        changes=dict(zip(features, changes.values(), strict=True)),
        selection=selection,
        whole=whole,
        error=error,
    )
    with model.edit() as (tracer, edited):
        steering.run(tracer, edited)
    return edited


@dataclass(frozen=True)
class Steering:
    """One checked way of steering, as an edit replays it."""

    hook_name: str
    sae: SAE[Any]
    changes: Mapping[int, Change]
    selection: TokenSelection
    whole: bool
    """Whether the hook lies where there are no tokens, so that every position is meant."""
    error: ErrorTerm

    def run(self, tracer: Any, model: VisionLanguageModel) -> None:  # noqa: ANN401 - nnsight ships no types
        """Steer every forward pass of a run, from within an nnsight edit."""
        if detect_fake_mode() is not None:
            # A scan asks for shapes alone, which steering does not change.
            return
        try:
            prompt_tokens = 0
            for step in tracer.all():
                prompt_tokens = self._step(model, step, prompt_tokens)
        except OutOfOrderError:
            # The loop asks for one pass more than there is, or the run was stopped before the hook: nothing is left
            # to steer. nnsight would warn of it at the end of every run.
            return

    def _step(self, model: VisionLanguageModel, step: int, prompt_tokens: int) -> int:
        """Steer one forward pass; return the length of the prompt, which is that of the first pass."""
        mask = None
        if not self.whole:
            forward = ForwardPass.current(model, step, prompt_tokens)
            prompt_tokens = forward.prompt_tokens
            mask = self.selection.mask(forward)
            if mask is None or not bool(mask.any()):
                return prompt_tokens
        value = model.hooks[self.hook_name]
        model.hooks[self.hook_name] = self._steered(value, mask)
        return prompt_tokens

    def _steered(self, value: Tensor, mask: Tensor | None) -> Tensor:
        """Steer the chosen positions of a hook's value; heads count as one dimension."""
        flat = value.flatten(2) if value.dim() > 3 else value
        mask = torch.ones(flat.shape[:-1], dtype=torch.bool) if mask is None else mask
        mask = mask.to(flat.device)
        steered = flat.clone()
        steered[mask] = steer_tokens(self.sae, flat[mask], self.changes, error=self.error)
        return steered.reshape(value.shape)


def steer_tokens(
    sae: SAE[Any], acts: Float[Tensor, "tokens d_in"], changes: Mapping[int, Change], *, error: ErrorTerm = "keep"
) -> Float[Tensor, "tokens d_in"]:
    """Change SAE features of tokens; see `steer` for what is computed.

    Sums are taken in the more precise of the model's and the SAE's types and rounded once, so a change of nothing
    changes no bit.
    """
    features = list(changes)
    if error == "drop":
        return _reconstructed(sae, acts, changes).to(acts.dtype)
    if not features:
        return acts
    chosen = list(changes.values())
    if needs_encoding(chosen):
        encoded = encode_tokens(sae, acts, features=features)
    else:
        encoded = torch.zeros(len(acts), len(features), dtype=sae.dtype, device=acts.device)
    added = feature_deltas(chosen, encoded) @ decoder_directions(sae, features).to(acts.device)
    scale = output_scale(sae, acts)
    added = added if scale is None else added * scale
    precise = torch.promote_types(acts.dtype, added.dtype)
    return (acts.to(precise) + added.to(precise)).to(acts.dtype)


def _reconstructed(sae: SAE[Any], acts: Tensor, changes: Mapping[int, Change]) -> Tensor:
    def change(encoded: Tensor) -> Tensor:
        if not changes:
            return encoded
        columns = torch.as_tensor(list(changes), device=encoded.device)
        before = encoded[:, columns]
        return encoded.index_copy(1, columns, before + feature_deltas(list(changes.values()), before))

    return reconstruct_tokens(sae, acts, change)
