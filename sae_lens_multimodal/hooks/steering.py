"""Checked interventions, and how an nnsight edit carries them out in every forward pass of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, Protocol, TypeAlias

import torch
from jaxtyping import Bool, Float
from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from nnsight.intervention.iterator import Iterations
from nnsight.intervention.source import Controller
from nnsight.intervention.util import first_input, replace_first_input
from sae_lens import SAE
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.utils.hooks import RemovableHandle

from sae_lens_multimodal.adapters.hook_points import HookPoint
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import SelectionError
from sae_lens_multimodal.hooks.changes import Change, RowTable, feature_deltas, needs_encoding
from sae_lens_multimodal.hooks.saes import decoder_directions, encode_tokens, output_scale, reconstruct_tokens
from sae_lens_multimodal.hooks.selection import ForwardPass, TokenSelection
from sae_lens_multimodal.hooks.vectors import SteeringVector, coordinates

ErrorTerm: TypeAlias = Literal["keep", "drop"]
"""What becomes of the part that the SAE does not reconstruct."""

Source: TypeAlias = "SAE[Any] | SteeringVector"
"""What features are taken from: an SAE, or a vector, which counts as one feature, 0."""


def steer_tokens(
    source: Source, acts: Float[Tensor, "tokens d_in"], changes: Mapping[int, Change], *, error: ErrorTerm = "keep"
) -> Float[Tensor, "tokens d_in"]:
    """Change features of tokens; see `steer` for what is computed.

    Sums are taken in the more precise of the model's and the SAE's types and rounded once, so a change of nothing
    changes no bit.
    """
    if error == "drop" and not isinstance(source, SteeringVector):
        return _reconstructed(source, acts, changes).to(acts.dtype)
    if not changes:
        return acts
    chosen = list(changes.values())
    encoded = _activations(source, acts, list(changes), wanted=needs_encoding(chosen))
    return _moved(source, acts, list(changes), feature_deltas(chosen, encoded))


def steer_rows(
    source: Source,
    acts: Float[Tensor, "tokens d_in"],
    changes: Sequence[Mapping[int, Change]],
    rows: Tensor,
    *,
    error: ErrorTerm = "keep",
) -> Float[Tensor, "tokens d_in"]:
    """Change features of tokens of several rows, each row's in its own way; `rows` says whose each token is."""
    if error == "drop" and not isinstance(source, SteeringVector):
        steered = acts.clone()
        for row, own in enumerate(changes):
            mine = rows == row
            steered[mine] = steer_tokens(source, acts[mine], own, error=error)
        return steered
    table = RowTable.of(changes)
    if not table.features:
        return acts
    encoded = _activations(source, acts, table.features, wanted=table.needs_encoding)
    return _moved(source, acts, table.features, table.deltas(encoded, rows))


def _activations(source: Source, acts: Tensor, features: Sequence[int], *, wanted: bool) -> Tensor:
    if isinstance(source, SteeringVector):
        return coordinates(source, acts)
    if wanted:
        return encode_tokens(source, acts, features=features)
    return torch.zeros(len(acts), len(features), dtype=source.dtype, device=acts.device)


def _moved(source: Source, acts: Tensor, features: Sequence[int], deltas: Tensor) -> Tensor:
    if isinstance(source, SteeringVector):
        added = deltas * source.vector.to(acts.device, deltas.dtype)
    else:
        added = deltas @ decoder_directions(source, features).to(acts.device)
        scale = output_scale(source, acts)
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


@dataclass(frozen=True)
class Part:
    """What is done at one hook with one SAE or vector."""

    hook: HookPoint
    source: Source
    changes: tuple[Mapping[int, Change], ...]
    """One for all rows, or one for each prompt."""
    error: ErrorTerm = "keep"

    @property
    def n_prompts(self) -> int | None:
        """How many prompts it treats each in its own way; None where all are treated alike."""
        return len(self.changes) if len(self.changes) > 1 else None

    def steered(self, value: Tensor, mask: Bool[Tensor, "batch seq"] | None) -> Tensor:
        """Steer the chosen positions of the hook's value, None for all; heads count as one dimension."""
        flat = value.flatten(2) if value.dim() > 3 else value
        n_rows = len(flat)
        # Beams and samples of a prompt lie side by side and share its changes.
        copies = n_rows // len(self.changes)
        if mask is None or bool(mask.all()):
            rows = torch.arange(n_rows).repeat_interleave(flat[0, ..., 0].numel()) // copies
            return self._moved(flat.reshape(-1, flat.shape[-1]), rows).reshape(value.shape)
        mask = mask.to(flat.device)
        steered = flat.clone()
        steered[mask] = self._moved(flat[mask], mask.nonzero()[:, 0] // copies)
        return steered.reshape(value.shape)

    def _moved(self, acts: Tensor, rows: Tensor) -> Tensor:
        if len(self.changes) == 1:
            return steer_tokens(self.source, acts, self.changes[0], error=self.error)
        return steer_rows(self.source, acts, self.changes, rows, error=self.error)


class Intervention(Protocol):
    """What is done to the value of one hook."""

    @property
    def hook(self) -> HookPoint:
        """Where."""

    @property
    def n_prompts(self) -> int | None:
        """How many prompts it treats each in its own way; None where all are treated alike."""

    def steered(self, value: Tensor, mask: Bool[Tensor, "batch seq"] | None) -> Tensor:
        """Change the chosen positions of the hook's value, None for all."""


@dataclass(frozen=True)
class Steering:
    """One checked way of steering, as an edit replays it."""

    parts: tuple[Intervention, ...]
    """In the order in which a forward pass reaches their hooks."""
    selection: TokenSelection
    whole: bool
    """Whether the hooks lie where there are no tokens, so that every position is meant."""
    may_be_empty: bool = False
    """Whether a run of whose prompts nothing is chosen goes through as it is."""

    def run(self, model: VisionLanguageModel) -> None:
        """Steer every forward pass of a run, from within an nnsight edit."""
        if detect_fake_mode() is not None:
            # A scan asks for shapes alone, which steering does not change.
            return
        alone = _steering_alone(model)
        if alone:
            if alone[0] is self:
                with _installed(alone, model):
                    Mediator.value("result")
            return
        try:
            prompt_tokens = 0
            for step in Iterations():
                prompt_tokens = self._step(model, step, prompt_tokens)
        except OutOfOrderError:
            # The loop asks for one pass more than there is, or the run was stopped before the hook: nothing is left
            # to steer. nnsight would warn of it at the end of every run.
            return

    def by_hook(self) -> Iterator[tuple[HookPoint, list[Intervention]]]:
        """Yield each hook with what is done there."""
        for hook, parts in groupby(self.parts, key=lambda part: part.hook):
            yield hook, list(parts)

    def mask(self, forward: ForwardPass) -> Bool[Tensor, "batch seq"] | None:
        """Return the positions to steer in a forward pass; None where there are none.

        Raises:
            SelectionError: changes by row do not fit the prompts; or nothing is chosen in the whole run.
        """
        for part in self.parts:
            if part.n_prompts not in (None, forward.prompts):
                raise SelectionError(
                    f"Got changes for {part.n_prompts} rows, but the batch has {forward.prompts} prompts; expected one "
                    "for each. `answer` takes so many at once as its batch_size says."
                )
        mask = self.selection.mask(forward)
        if mask is not None and bool(mask.any()):
            return mask
        if forward.step == 0 and self.selection.is_about_prompts and not self.may_be_empty:
            raise SelectionError(
                f"{self.selection.spelt} selects nothing in these prompts, so nothing would be steered; choose others, "
                "or let such prompts through as they are with if_empty='ignore'."
            )
        return None

    def _step(self, model: VisionLanguageModel, step: int, prompt_tokens: int) -> int:
        """Steer one forward pass; return the length of the prompt, which is that of the first pass."""
        mask = None
        if not self.whole:
            forward = ForwardPass.current(model, step, prompt_tokens)
            prompt_tokens = forward.prompt_tokens
            mask = self.mask(forward)
            if mask is None:
                return prompt_tokens
        for hook, parts in self.by_hook():
            value = model.hooks[hook.name]
            for part in parts:
                value = part.steered(value, mask)
            model.hooks[hook.name] = value
        return prompt_tokens


def _steering_alone(model: VisionLanguageModel) -> list[Steering]:
    """Return all that takes part in this run if that is steering alone, else nothing.

    Plain hooks do then, and nnsight need not follow every module. Values within a module's forward, and those that lie
    in pieces on several devices, are nnsight's to find.
    """
    interleaver = model.interleaver
    found = [mediator.lcls.get("steering") for mediator in interleaver.mediators]
    ours = [one for one in found if isinstance(one, Steering)]
    split = interleaver.fragments is not None and interleaver.fragments.enabled
    inside = any(part.hook.operation is not None for one in ours for part in one.parts)
    return [] if split or inside or len(ours) < len(found) else ours


@dataclass
class _Run:
    """Where a run stands while plain hooks steer it."""

    steering: Steering
    model: VisionLanguageModel
    step: int = -1
    prompt_tokens: int = 0
    mask: Tensor | None = field(default=None, repr=False)

    def begin(self, _module: nn.Module, _args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Work out, before each forward pass, which positions it is about."""
        # Every worker has plain hooks, so modules that are followed still have nothing to hand over to nnsight either.
        self.model.interleaver.busy = False
        if self.steering.whole:
            return
        self.step += 1
        forward = ForwardPass.of(self.model, inputs, self.step, self.prompt_tokens)
        self.prompt_tokens = forward.prompt_tokens
        self.mask = self.steering.mask(forward)

    def steered(self, value: Tensor, parts: Sequence[Intervention]) -> Tensor:
        """Steer one hook's value."""
        if self.mask is None and not self.steering.whole:
            return value
        for part in parts:
            value = part.steered(value, self.mask)
        return value


@contextmanager
def _installed(everyone: Sequence[Steering], model: VisionLanguageModel) -> Iterator[None]:
    """Have plain PyTorch hooks do the steering until the run ends, however it ends."""
    with ExitStack() as stack:
        _unfollowed(model, stack)
        # Put before the hooks with which transformers records hidden states, the last first, so that they keep order.
        for steering in reversed(everyone):
            run = _Run(steering, model)
            stack.callback(model._module.register_forward_pre_hook(run.begin, with_kwargs=True).remove)
            for hook, parts in reversed(list(steering.by_hook())):
                stack.callback(_register(run, model._module.get_submodule(hook.module_path), hook, parts).remove)
        yield


def _unfollowed(model: VisionLanguageModel, stack: ExitStack) -> None:
    """Let modules run their own forward until the stack unwinds, not the one in which nnsight follows each operation.

    Nobody asks for any of their values; following costs a small model a tenth of its time and more.
    """
    for module in model._module.modules():
        own = module.__dict__
        follower = own.get("forward")
        plain = isinstance(follower, Controller) and follower.state.original is type(module).forward
        if plain and "_hf_hook" not in own:
            del own["forward"]
            stack.callback(own.__setitem__, "forward", follower)


def _register(run: _Run, module: nn.Module, hook: HookPoint, parts: Sequence[Intervention]) -> RemovableHandle:
    if hook.side == "input":
        return module.register_forward_pre_hook(_input_hook(run, parts), prepend=True, with_kwargs=True)
    return module.register_forward_hook(_output_hook(run, hook, parts), prepend=True)


def _input_hook(run: _Run, parts: Sequence[Intervention]) -> Callable[..., tuple[Any, Any]]:
    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        args, kwargs = replace_first_input(args, kwargs, run.steered(first_input(args, kwargs), parts))
        return args, kwargs

    return before


def _output_hook(run: _Run, hook: HookPoint, parts: Sequence[Intervention]) -> Callable[..., Any]:
    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401 - the module's own
        if hook.element is None:
            return run.steered(output, parts)
        value = run.steered(output[hook.element], parts)
        return (*output[: hook.element], value, *output[hook.element + 1 :])

    return after
