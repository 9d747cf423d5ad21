"""One call of a transformers attention function: who may look at whom in it, and the same call with another mask."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, UnsupportedModelError
from sae_lens_multimodal.hooks.rounding import rounding

TAKE_MASKS = ("eager", "sdpa")
"""Implementations of attention that take any mask."""
_ARGUMENTS = ("module", "query", "key", "value", "attention_mask")
"""What transformers' attention modules give every implementation, in this order."""


def language_config(model: VisionLanguageModel) -> Any:  # noqa: ANN401 - a transformers config
    """The configuration that the language model's attention reads."""
    return model._module.config.get_text_config(decoder=True)


def attention_module(model: VisionLanguageModel, layer: int) -> str:
    """The path of a block's attention: of the module that holds its output projection."""
    return model.hooks.resolve(f"blocks.{layer}.attn.hook_z").module_path.rpartition(".")[0]


def maskable(config: Any) -> str:  # noqa: ANN401 - a transformers config
    """The implementation that takes any mask and computes what the model asks for."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


@contextmanager
def attention_as(model: VisionLanguageModel, implementation: str) -> Iterator[None]:
    """Let the language model compute its attention in another way than it was loaded with."""
    config = language_config(model)
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


@dataclass(frozen=True)
class AttentionCall:
    """What an attention function is called with: queries and keys after rotation, cached keys among them, and a mask.

    What the mask is depends on the implementation: for `eager` numbers that are added to scores; for `sdpa` such
    numbers or booleans, None where all is causal; for flash attention which keys are padding, None where none is, with
    windows beside it; for `flex_attention` a function of positions.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def given(self, name: str) -> Any:  # noqa: ANN401 - any argument
        """One argument, by its name; None where it was not given."""
        place = _ARGUMENTS.index(name) if name in _ARGUMENTS else len(self.args)
        return self.args[place] if place < len(self.args) else self.kwargs.get(name)

    @property
    def module(self) -> nn.Module:
        """The attention module that calls."""
        found: nn.Module = self.given("module")
        return found

    @property
    def query(self) -> Float[Tensor, "rows heads queries head_width"]:
        """The queries of this pass's tokens."""
        found: Tensor = self.given("query")
        return found

    @property
    def n_keys(self) -> int:
        """How many tokens can be looked at, cached ones among them."""
        return int(self.given("key").shape[2])

    @property
    def implementation(self) -> str:
        """Which attention function is called."""
        config: Any = self.module.config
        return str(config._attn_implementation)

    @property
    def takes_masks(self) -> bool:
        """Whether the function takes any mask."""
        return self.implementation in TAKE_MASKS

    @property
    def _is_causal(self) -> bool:
        """Whether the function is to see to it by itself that nobody looks ahead."""
        found = self.given("is_causal")
        return bool(getattr(self.module, "is_causal", True) if found is None else found)

    def visible(self) -> Bool[Tensor, "rows heads queries keys"]:
        """Who may look at whom; one head stands for all where they are alike. Tokens of padding may look at nobody.

        Raises:
            ConfigError: the call belongs to continuous batching, which packs several prompts into one.
            UnsupportedModelError: the mask is of an unknown kind.
        """
        if self.kwargs.get("cache") is not None:
            raise ConfigError("Got a run of continuous batching (cache_implementation='paged'); use plain generation.")
        rows, _, queries, _ = self.query.shape
        mask = self.given("attention_mask")
        if isinstance(mask, BlockMask):
            found = create_mask(mask.mask_mod, rows, 1, queries, self.n_keys, mask.kv_num_blocks.device)
        elif mask is None:
            found = self._unmasked()
        elif isinstance(mask, Tensor) and mask.dim() == 4:
            found = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            found = found[..., : self.n_keys]
        elif isinstance(mask, Tensor) and mask.dim() == 2:
            found = self._unpadded(mask.to(torch.bool))
        else:
            raise UnsupportedModelError(
                f"attn_implementation={self.implementation!r} is given a mask of an unknown kind, "
                f"{type(mask).__name__}; load the model with 'sdpa'."
            )
        return found.to(self.query.device).expand(rows, -1, -1, -1)

    def with_mask(self, mask: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another mask."""
        place = _ARGUMENTS.index("attention_mask")
        if place < len(self.args):
            return (*self.args[:place], mask, *self.args[place + 1 :]), self.kwargs
        return self.args, {**self.kwargs, "attention_mask": mask}

    def output(self, mask: Tensor) -> Float[Tensor, "rows queries heads head_width"]:
        """What attention gives under a mask of its own, by a function that takes one."""
        special = any(self.given(name) is not None for name in ("softcap", "s_aux"))
        eager: Any = getattr(sys.modules[type(self.module).__module__], "eager_attention_forward", None)
        if special and eager is None:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} caps its scores or has sinks, and has no eager attention to be masked."
            )
        function: Callable[..., Any] = eager if special else ALL_ATTENTION_FUNCTIONS["sdpa"]
        args, kwargs = self.with_mask(mask)
        found: Tensor = function(*args, **kwargs)[0]
        return found

    def check(self, visible: Bool[Tensor, "rows heads queries keys"]) -> None:
        """Check that the call gives what a mask of the visible tokens gives, but for rounding.

        Raises:
            UnsupportedModelError: it does not, so that its mask is not what `visible` takes it for.
        """
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, _no_attention)
        expected = function(*self.args, **self.kwargs)[0]
        found = self.output(additive(visible, self.query))
        real = visible.any(-1).any(1)
        off = (found[real].float() - expected[real].float()).abs().amax()
        size = expected[real].float().abs().amax()
        if not bool(off <= 2 * rounding(expected.dtype) * size.clamp(min=1e-6)):
            raise UnsupportedModelError(
                f"attn_implementation={self.implementation!r} gives something that is off by {float(off):.3g} from "
                "what its mask was understood to mean; load the model with 'sdpa'."
            )

    def _unmasked(self) -> Bool[Tensor, "1 1 queries keys"]:
        """Who may look at whom where there is no mask."""
        queries, keys = self.query.shape[2], self.n_keys
        everyone = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=self.query.device)
        if not self._is_causal or self.implementation in ("eager", "flex_attention"):
            return everyone
        if self.implementation == "sdpa":
            # PyTorch's own causal mask counts from the first key, and is left out for a single query
            return everyone if queries == 1 else everyone.tril()
        return self._unpadded(everyone[0, :, 0])

    def _unpadded(self, real: Bool[Tensor, "rows keys"]) -> Bool[Tensor, "rows 1 queries keys"]:
        """Who may look at whom in flash attention, which takes padding out and lets the last query see the last key."""
        queries, length = self.query.shape[2], real.shape[1]
        mine = slice(length - queries, length)
        # a cache with room to spare has more keys than the mask
        keys = torch.nn.functional.pad(real, (0, self.n_keys - length))
        place = keys.cumsum(-1) - 1
        later, earlier = place[:, mine, None], place[:, None, :]
        seen = keys[:, None, :].expand(-1, queries, -1)
        if queries > 1:
            seen = seen & real[:, mine, None]
        if self._is_causal:
            seen = seen & (earlier <= later)
        window = self.given("sliding_window")
        if window is not None:
            seen = seen & ((later - earlier).abs() < window)
        return seen[:, None]


def additive(visible: Bool[Tensor, "..."], like: Tensor) -> Float[Tensor, "..."]:
    """What is added to scores so that nobody looks at what is not visible."""
    mask = torch.zeros(visible.shape, dtype=like.dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(like.dtype).min)


def _no_attention(*_args: object, **_kwargs: object) -> Any:  # noqa: ANN401 - never returns
    raise UnsupportedModelError("the model's attention function is not registered with transformers.")
