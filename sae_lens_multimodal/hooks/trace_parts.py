"""What a causal trace can restore: the residual stream, what attention or MLP add to it, single heads, SAE features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.gradients import check_language_hook
from sae_lens_multimodal.hooks.saes import check_features, check_sae, decoder_directions, encode_tokens, output_scale
from sae_lens_multimodal.hooks.trace_run import Recording, value_of

HOOKS = {"resid": "hook_resid_post", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}
"""What each part of a block is called, and its hook."""
HEAD_HOOK = "attn.hook_z"


@dataclass(frozen=True)
class Head:
    """One attention head of every layer, before its output projection."""

    index: int


@dataclass(frozen=True)
class SAEFeatures:
    """Features of an SAE, at its hook: their clean activations instead of the corrupted ones; the rest stays."""

    sae: SAE[Any] = field(repr=False)
    features: Sequence[int] | None = None
    """Which; None for all."""
    hook_name: str | None = None
    """The hook; None for the one the SAE was trained on."""

    @property
    def label(self) -> str:
        """The part in words."""
        if self.features is None:
            return "all features"
        numbers = ", ".join(map(str, self.features))
        return f"feature {numbers}" if len(self.features) == 1 else f"features {numbers}"


Part: TypeAlias = "str | Head | SAEFeatures"
"""`"resid"`, `"attn_out"`, `"mlp_out"`, `"heads"` (every head by itself), `Head(3)` or `SAEFeatures(sae, [12])`."""


class Restoring(ABC):
    """A part, bound to the clean and the corrupted run."""

    label: str

    @abstractmethod
    def hook(self, layer: int) -> str | None:
        """The hook that is written at a layer; None where the part does not exist."""

    @abstractmethod
    def changed(self, layer: int) -> Bool[Tensor, " seq"]:
        """The positions at which clean and corrupted differ."""

    @abstractmethod
    def put(
        self, value: Tensor, layer: int, rows: Int[Tensor, " n"], places: Int[Tensor, " n"], start: int
    ) -> Float[Tensor, "rows positions width"]:
        """Restore some positions of some rows; the value begins at position `start` of the prompt."""


@final
class RestoredHook(Restoring):
    """A hook's clean value, whole or of one head."""

    def __init__(self, label: str, hook: str, head: int | None, heads: int | None) -> None:
        """Start without values; `bind` gives them."""
        self.label, self._hook, self._head, self._heads = label, hook, head, heads
        self._clean: dict[int, Tensor] = {}
        self._corrupted: dict[int, Tensor] = {}

    def bind(self, model: VisionLanguageModel, clean: Recording, corrupted: Recording) -> RestoredHook:
        """Take the values of the two runs."""
        for layer in range(model.n_layers):
            name = self.hook(layer)
            point = model.hooks.resolve(name)
            value = value_of(clean.values[name], point)[0]
            if self._hook == HOOKS["resid"]:
                # what the model adds before the next block is restored too: the corrupted run's is added again later
                value = value + _more_added(clean.added[layer], corrupted.added[layer], value)
            self._clean[layer] = self._own(value)
            self._corrupted[layer] = self._own(value_of(corrupted.values[name], point)[0])
        return self

    def hook(self, layer: int) -> str:
        """The hook of this part in a block."""
        return f"blocks.{layer}.{self._hook}"

    def changed(self, layer: int) -> Bool[Tensor, " seq"]:
        """The positions at which the two runs differ here."""
        return (self._clean[layer] != self._corrupted[layer]).any(-1)

    def put(self, value: Tensor, layer: int, rows: Tensor, places: Tensor, start: int) -> Tensor:
        """Write the clean value."""
        restored = value.clone()
        own = self._own(restored)
        own[rows, places - start] = self._clean[layer][places].to(value)
        return restored

    def _own(self, value: Tensor) -> Tensor:
        """The part of a hook's value that is this head's, as a view."""
        if self._head is None or self._heads is None:
            return value
        return value.unflatten(-1, (self._heads, -1))[..., self._head, :]


@final
class RestoredFeatures(Restoring):
    """What an SAE's features add, clean instead of corrupted; the SAE's error and everything else stay."""

    def __init__(self, model: VisionLanguageModel, part: SAEFeatures, clean: Recording, corrupted: Recording) -> None:
        """Work out the difference of the two runs' features."""
        self.label = part.label
        self._name = check_sae(model, part.sae, part.hook_name)
        point = model.hooks.resolve(self._name)
        self._layer = point.layer
        before, after = (value_of(one.values[self._name], point)[0] for one in (corrupted, clean))
        difference = added_by(part.sae, after, part.features) - added_by(part.sae, before, part.features)
        self._difference = difference.reshape(before.shape)

    def hook(self, layer: int) -> str | None:
        """The SAE's hook, at its own layer alone."""
        return self._name if layer == self._layer else None

    def changed(self, layer: int) -> Bool[Tensor, " seq"]:
        """The positions at which the features differ."""
        return (self._difference != 0).any(-1) & (layer == self._layer)

    def put(self, value: Tensor, layer: int, rows: Tensor, places: Tensor, start: int) -> Tensor:
        """Add the difference."""
        del layer
        restored = value.clone()
        restored[rows, places - start] += self._difference[places].to(value)
        return restored


def _more_added(clean: Tensor | None, corrupted: Tensor | None, like: Tensor) -> Tensor:
    """What a model adds between two blocks in the clean run, less what it adds in the corrupted one."""
    one, two = (torch.zeros_like(like) if added is None else added[0].to(like) for added in (clean, corrupted))
    return one - two


@torch.no_grad()
def added_by(
    sae: SAE[Any], acts: Float[Tensor, "tokens d_in"], features: Sequence[int] | None
) -> Float[Tensor, "tokens d_in"]:
    """What some features, or all, add to the value of each token."""
    chosen = list(range(sae.cfg.d_sae)) if features is None else check_features(sae, features)
    return decoded(sae, acts, encode_tokens(sae, acts, features=chosen), chosen)


@torch.no_grad()
def decoded(
    sae: SAE[Any], acts: Float[Tensor, "tokens d_in"], activations: Float[Tensor, "tokens k"], features: Sequence[int]
) -> Float[Tensor, "tokens d_in"]:
    """What features of known activations add to the value of each token."""
    added = activations @ decoder_directions(sae, features).to(activations)
    scale = output_scale(sae, acts)
    return (added if scale is None else added * scale.to(added)).float()


def hooks_of(model: VisionLanguageModel, parts: Iterable[Part]) -> list[str]:
    """The hooks that have to be recorded to restore some parts, in all layers, and to go on from there.

    Raises:
        ConfigError: a part is none of the known.
        SAEMismatchError: an SAE does not fit its hook.
    """
    names: dict[str, None] = {}
    for part in parts:
        if isinstance(part, SAEFeatures):
            name = check_sae(model, part.sae, part.hook_name)
            check_language_hook(model, name)
            if model.hooks.resolve(name).layer is None:
                raise ConfigError(f"Got an SAE at {name}, which is in no block; expected a hook such as blocks.0.…")
            names[name] = None
    hooks = [*HOOKS.values(), *([HEAD_HOOK] if any(_is_head(part) for part in parts) else [])]
    for layer in range(model.n_layers):
        names.update(dict.fromkeys(f"blocks.{layer}.{hook}" for hook in hooks))
    return list(names)


def bind(model: VisionLanguageModel, parts: Sequence[Part], clean: Recording, corrupted: Recording) -> list[Restoring]:
    """Bind parts to the two runs; `"heads"` becomes as many as there are.

    Raises:
        ConfigError: a part is none of the known, or there is no such head.
    """
    found: list[Restoring] = []
    for part in parts:
        if isinstance(part, SAEFeatures):
            found.append(RestoredFeatures(model, part, clean, corrupted))
        else:
            found.extend(one.bind(model, clean, corrupted) for one in _restored(model, part))
    return found


def _is_head(part: Part) -> bool:
    return isinstance(part, Head) or part == "heads"


def _restored(model: VisionLanguageModel, part: Part) -> list[RestoredHook]:
    if isinstance(part, str) and part in HOOKS:
        return [RestoredHook(part, HOOKS[part], None, None)]
    if not _is_head(part):
        raise ConfigError(
            f"Got the part {part!r}; expected {', '.join(HOOKS)}, heads, Head(index) or SAEFeatures(sae, features)."
        )
    count = model.hooks.resolve(f"blocks.0.{HEAD_HOOK}").heads or 0
    wanted = [part.index] if isinstance(part, Head) else range(count)
    if any(not 0 <= index < count for index in wanted):
        raise ConfigError(f"Got {part!r}; the model has the heads 0 to {count - 1}.")
    return [RestoredHook(f"head {index}", HEAD_HOOK, index, count) for index in wanted]
