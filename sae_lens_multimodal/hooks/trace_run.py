"""A recorded forward pass of one prompt, and passes that go on from the middle of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from nnsight.intervention.util import first_input, replace_first_input
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.hook_points import HookPoint
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError, UnknownHookError, UnsupportedModelError
from sae_lens_multimodal.hooks.attention_calls import (
    TAKE_MASKS,
    attention_as,
    attention_module,
    language_config,
    maskable,
)
from sae_lens_multimodal.hooks.lens import final_logits
from sae_lens_multimodal.hooks.rounding import rounding
from sae_lens_multimodal.hooks.trace_masks import causal_mask, is_causal, sliced

logger = logging.getLogger(__name__)

Change: TypeAlias = Callable[[Tensor], Tensor]
"""From a hook's value [rows, positions, ...] to another; heads are one dimension."""

CACHE = "past_key_values"
"""How transformers' blocks call the store of keys and values."""


class KeptKeys(DynamicCache):
    """Keys and values of a recorded pass, which later passes read up to a position and never write."""

    def __init__(self) -> None:
        """Start empty, and keep what comes."""
        super().__init__()
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.upto: int | None = None
        """How many positions are put before what a pass computes itself; None while recording."""

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_args: object,
        **_kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Keep what comes, or put what was kept before it."""
        if self.upto is None:
            self.kept[layer_idx] = (key_states, value_states)
            return key_states, value_states
        rows = len(key_states)
        before = [one[:, :, : self.upto].expand(rows, -1, -1, -1) for one in self.kept[layer_idx]]
        return torch.cat([before[0], key_states], dim=2), torch.cat([before[1], value_states], dim=2)


@dataclass(frozen=True)
class Call:
    """What a block was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Float[Tensor, "1 seq d_model"]:
        """The residual stream before the block."""
        value: Tensor = first_input(self.args, self.kwargs)
        return value


@dataclass(frozen=True)
class Recording:
    """Everything of one pass that a trace needs."""

    calls: list[Call]
    """Of every block."""
    values: dict[str, Any]
    """The whole output of the modules whose hooks were asked for, by hook name; for inputs the value itself."""
    logits: Float[Tensor, "k vocabulary"]
    """After the last k positions, as the model itself computes them, in float32."""
    added: list[Tensor | None]
    """What the model adds to the residual stream between each block and the next, where it does."""


class BlockRunner:
    """Runs a model's blocks by themselves, from any block on and for the last positions alone."""

    def __init__(self, model: VisionLanguageModel, *, keep_logits: int = 1) -> None:
        """Find the blocks by the family's own names.

        Raises:
            SelectionError: the model has edits, which plain modules do not know.
        """
        if model._edits:
            raise SelectionError("Got a model with edits; tracing runs its modules directly, so give the plain model.")
        self.model = model
        self.root: nn.Module = model._module
        self.keep_logits = keep_logits
        self.points = [model.hooks.resolve(f"blocks.{layer}.hook_resid_post") for layer in range(model.n_layers)]
        self.blocks = [self.root.get_submodule(point.module_path) for point in self.points]
        config = language_config(model)
        loaded = str(config._attn_implementation)
        # flex attention would compile itself anew for every number of rows, and others are unknown
        self.implementation = loaded if loaded in TAKE_MASKS or "flash" in loaded else maskable(config)

    # Recording -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def record(
        self, batch: EncodedBatch, hook_names: Sequence[str] = (), noise: Float[Tensor, "1 seq d_model"] | None = None
    ) -> Recording:
        """Run the whole model once and keep what is asked for.

        Args:
            batch: one prompt, on the model's device.
            hook_names: hooks whose modules' outputs are kept.
            noise: added to the residual stream before the first block.
        """
        calls: dict[int, Call] = {}
        outputs: dict[int, Tensor] = {}
        values: dict[str, Any] = {}
        with ExitStack() as stack:
            if noise is not None:
                first = self.blocks[0].register_forward_pre_hook(_adding(noise), with_kwargs=True)
                stack.callback(first.remove)
            for layer, block in enumerate(self.blocks):
                stack.callback(block.register_forward_pre_hook(_keeping_call(calls, layer), with_kwargs=True).remove)
                after = block.register_forward_hook(_keeping_output(outputs, layer, self.points[layer]))
                stack.callback(after.remove)
            for name in hook_names:
                stack.callback(self._keep_value(values, name).remove)
            stack.enter_context(attention_as(self.model, self.implementation))
            logits = self.root(**batch, use_cache=False).logits
        added: list[Tensor | None] = []
        for layer in range(len(self.blocks) - 1):
            following = calls[layer + 1].hidden.to(outputs[layer].device)
            same = torch.equal(outputs[layer], following)
            added.append(None if same else following - outputs[layer])
        kept = logits[0, -self.keep_logits :].float()
        return Recording([calls[layer] for layer in range(len(self.blocks))], values, kept, [*added, None])

    def _keep_value(self, values: dict[str, Any], name: str) -> RemovableHandle:
        point = self.point(name)
        module = self.root.get_submodule(point.module_path)
        if point.side == "input":

            def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                values[name] = first_input(args, kwargs).detach()

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - the module's own
            values[name] = output

        return module.register_forward_hook(after)

    def point(self, name: str) -> HookPoint:
        """Return a hook of the language model that plain PyTorch hooks can reach.

        Raises:
            UnknownHookError: there is none of this name, or it lies within a module's forward.
        """
        point = self.model.hooks.resolve(name)
        if point.operation is not None or point.tower != "language":
            raise UnknownHookError(
                f"{name} lies within a module's forward or outside of the language model; expected a hook such as "
                "blocks.0.hook_attn_out."
            )
        return point

    # Going on --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def go_on(
        self,
        recording: Recording,
        layer: int,
        hidden: Float[Tensor, "rows positions d_model"],
        *,
        keys: KeptKeys | None = None,
        changes: Mapping[str, Change] | None = None,
        skipped: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "rows k vocabulary"]:
        """Run the blocks from one on, the final norm and the unembedding.

        Args:
            recording: the pass whose masks, positions and additions hold.
            layer: the first block that runs; the number of blocks for none.
            hidden: the residual stream before it, of the last positions of the prompt (all of them without `keys`).
            keys: keys and values of the positions before those; None where all are given.
            changes: what to do at hooks.
            skipped: modules, by path, that do not run in the first block but give this output instead.
        """
        start = recording.calls[0].hidden.shape[1] - hidden.shape[1]
        with ExitStack() as stack:
            stack.enter_context(attention_as(self.model, self.implementation))
            for name, change in (changes or {}).items():
                stack.callback(self._change(name, change).remove)
            for number in range(layer, len(self.blocks)):
                call = self._call(recording.calls[number], start, keys, len(hidden))
                args, kwargs = replace_first_input(call.args, call.kwargs, hidden)
                with _skipping(self.root, skipped if number == layer else None):
                    output = self.blocks[number](*args, **kwargs)
                element = self.points[number].element
                hidden = output if element is None else output[element]
                extra = recording.added[number]
                hidden = hidden if extra is None else hidden + extra[:, start:]
        return final_logits(self.model, hidden[:, -self.keep_logits :])

    def keys_of(self, recording: Recording) -> KeptKeys | None:
        """Run a recorded pass's blocks again and keep their keys and values; None where they cannot be used.

        Raises:
            UnsupportedModelError: the blocks by themselves do not give the model's own logits.
        """
        keys, hidden = KeptKeys(), recording.calls[0].hidden
        usable = self._can_cut(recording)
        found = self.go_on(recording, 0, hidden, keys=keys if usable else None)[0]
        if not _alike(found, recording.logits, hidden.dtype):
            off = float((found - recording.logits).abs().max())
            raise UnsupportedModelError(
                f"the blocks of {self.model.name}, run by themselves, give logits that are off by up to {off:.3g}; "
                "this family does something between them that tracing does not know."
            )
        middle = hidden.shape[1] // 2
        if not usable or len(keys.kept) != len(self.blocks) or not middle:
            return None
        keys.upto = middle
        again = self.go_on(recording, 0, hidden[:, middle:], keys=keys)[0]
        if _alike(again, recording.logits, hidden.dtype):
            return keys
        logger.info("the blocks of %s do not go on from kept keys; whole prompts are run", self.model.name)
        return None

    def _can_cut(self, recording: Recording) -> bool:
        """Whether what comes before a position does not depend on it, and the call is of a known form."""
        kinds = getattr(language_config(self.model), "layer_types", None) or ()
        # other layers keep a state in place of keys and values
        plain = all("linear" not in kind and "conv" not in kind for kind in kinds)
        known = plain and all(CACHE in call.kwargs and call.kwargs[CACHE] is None for call in recording.calls)
        length = recording.calls[0].hidden.shape[1]
        masks = [call.kwargs.get("attention_mask") for call in recording.calls]
        causal = self._is_causal() and all(is_causal(mask, length, self.implementation) for mask in masks)
        return known and causal and all(sliced(call.kwargs, 0, length) is not None for call in recording.calls)

    def _is_causal(self) -> bool:
        """Whether every attention sees to it by itself that nobody looks ahead, where it is given no mask."""
        names = set(self.model.hooks.names())
        layers = [layer for layer in range(len(self.blocks)) if f"blocks.{layer}.attn.hook_z" in names]
        modules = [self.root.get_submodule(attention_module(self.model, layer)) for layer in layers]
        return all(getattr(module, "is_causal", True) for module in modules)

    def _call(self, call: Call, start: int, keys: KeptKeys | None, rows: int) -> Call:
        mask = call.kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            # flash attention takes padding out of every row by itself
            call = replace(call, kwargs={**call.kwargs, "attention_mask": mask.expand(rows, -1)})
        if keys is None:
            return call
        length = call.hidden.shape[1]
        kwargs = dict(call.kwargs)
        if start:
            keys.upto = start
            if kwargs.get("attention_mask") is None and self.implementation == "sdpa":
                kwargs["attention_mask"] = causal_mask(length, call.hidden)
            kwargs = sliced(kwargs, start, length) or kwargs
        elif keys.upto is not None:
            return call
        return replace(call, kwargs={**kwargs, CACHE: keys})

    def _change(self, name: str, change: Change) -> RemovableHandle:
        point = self.point(name)
        module = self.root.get_submodule(point.module_path)
        if point.side == "input":

            def before(
                _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                args, kwargs = replace_first_input(args, kwargs, change(first_input(args, kwargs)))
                return args, kwargs

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401 - the module's own
            return with_value(output, point, change(value_of(output, point)))

        return module.register_forward_hook(after)


def check_layers(model: VisionLanguageModel, layers: Sequence[int] | None) -> list[int]:
    """Check numbers of layers; None for all.

    Raises:
        ConfigError: there are none, or one that the model has not.
    """
    numbers = list(range(model.n_layers)) if layers is None else [int(layer) for layer in layers]
    if not numbers or any(not 0 <= layer < model.n_layers for layer in numbers):
        raise ConfigError(f"Got layers={numbers}; the model has the layers 0 to {model.n_layers - 1}.")
    return numbers


def value_of(output: Any, point: HookPoint) -> Tensor:  # noqa: ANN401 - a module's output
    """The hook's value within what its module returned."""
    value: Tensor = output if point.element is None else output[point.element]
    return value


def with_value(output: Any, point: HookPoint, value: Tensor) -> Any:  # noqa: ANN401 - a module's output
    """What its module returned, with another value at the hook."""
    if point.element is None:
        return value
    return (*output[: point.element], value, *output[point.element + 1 :])


@contextmanager
def _skipping(root: nn.Module, skipped: Mapping[str, Any] | None) -> Iterator[None]:
    """Let modules give an output without running."""
    before: list[tuple[dict[str, Any], Any]] = []
    missing = object()
    try:
        for path, output in (skipped or {}).items():
            own = root.get_submodule(path).__dict__
            before.append((own, own.get("forward", missing)))
            own["forward"] = _Giving(output)
        yield
    finally:
        for own, forward in before:
            if forward is missing:
                del own["forward"]
            else:
                own["forward"] = forward


@dataclass(frozen=True)
class _Giving:
    """A forward that returns what it was told to."""

    output: Any = field(repr=False)

    def __call__(self, *_args: object, **_kwargs: object) -> Any:  # noqa: ANN401 - a module's own output
        return self.output


def _alike(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits agree as far as sums in another order do."""
    size = float(expected.abs().max())
    return bool(torch.allclose(found, expected.to(found.device), rtol=0, atol=size * rounding(dtype)))


def _adding(noise: Tensor) -> Callable[..., tuple[Any, Any]]:
    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        value = first_input(args, kwargs)
        return replace_first_input(args, kwargs, value + noise.to(value))

    return before


def _keeping_call(calls: dict[int, Call], layer: int) -> Callable[..., None]:
    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[layer] = Call(args, dict(kwargs))

    return before


def _keeping_output(outputs: dict[int, Tensor], layer: int, point: HookPoint) -> Callable[..., None]:
    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - the module's own
        outputs[layer] = value_of(output, point)

    return after
