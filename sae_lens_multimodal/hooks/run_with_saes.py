"""Running a model with SAEs spliced in, spelled as SAE-Lens's hooked transformer spells it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.iterator import Iterations
from sae_lens import SAE
from sae_lens.util import get_special_token_ids
from torch import Tensor
from torch._guards import detect_fake_mode

from sae_lens_multimodal.adapters.hook_points import HookPoint
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import SelectionError
from sae_lens_multimodal.hooks.saes import CHUNK_TOKENS, check_sae, inference_sae

NamesFilter: TypeAlias = "str | Sequence[str] | Callable[[str], bool] | None"
"""Which values to keep, as in TransformerLens: one name, several, or a function of the name; None: all."""

SpecialTokens: TypeAlias = "bool | list[int]"
"""Whether tokens such as the beginning, the end and padding bypass the SAE; or the ids of those that do."""


@contextmanager
def saes(
    model: VisionLanguageModel,
    saes: SAE[Any] | Sequence[SAE[Any]] = (),
    *,
    reset_saes_end: bool = True,
    use_error_term: bool | None = None,
    exclude_special_tokens: SpecialTokens = False,
) -> Iterator[VisionLanguageModel]:
    """Splice SAEs into a model while the context lasts: what it computes goes through their reconstructions.

    They take part in everything that runs through the model: `trace`, `generate`, `answer`. An SAE takes the place of
    one that is attached at its hook already, until the context ends.

    Args:
        model: The model; it is changed while the context lasts. `steer(model, sae, {}, error="drop")` gives a copy.
        saes: One SAE or several.
        reset_saes_end: Leave the model as it was found. Otherwise the SAEs stay until `reset_saes`.
        use_error_term: Add what an SAE does not reconstruct, so that nothing changes unless its features are hooked;
            None: as each SAE has it.
        exclude_special_tokens: Let control tokens bypass the SAEs.

    Raises:
        SAEMismatchError: an SAE does not fit its hook.
        UnknownHookError: the model has no such hook.
    """
    attachments = _attachments(model, saes, use_error_term, exclude_special_tokens)
    with _attached(model, attachments, reset=reset_saes_end):
        yield model


def run_with_saes(
    model: VisionLanguageModel,
    *model_args: Any,  # noqa: ANN401 - what `trace` takes
    saes: SAE[Any] | Sequence[SAE[Any]] = (),
    reset_saes_end: bool = True,
    use_error_term: bool | None = None,
    exclude_special_tokens: SpecialTokens = False,
    **model_kwargs: Any,  # noqa: ANN401 - what `trace` takes
) -> Float[Tensor, "batch seq vocabulary"]:
    """Run one forward pass with SAEs spliced in, and return the logits; see `saes` for the options.

    Args:
        model: The model.
        *model_args: Chat messages, or what else `model.trace` takes.
        saes: One SAE or several.
        reset_saes_end: Leave the model as it was found.
        use_error_term: Whether to add what an SAE does not reconstruct; None: as each SAE has it.
        exclude_special_tokens: Let control tokens bypass the SAEs.
        **model_kwargs: The model's inputs: `run_with_saes(model, **batch, saes=[sae])`.
    """
    attachments = _attachments(model, saes, use_error_term, exclude_special_tokens)
    with _attached(model, attachments, reset=reset_saes_end):
        logits: Tensor = model.trace(*model_args, **model_kwargs, trace=False).logits
    return logits


def run_with_cache_with_saes(
    model: VisionLanguageModel,
    *model_args: Any,  # noqa: ANN401 - what `trace` takes
    saes: SAE[Any] | Sequence[SAE[Any]] = (),
    reset_saes_end: bool = True,
    use_error_term: bool | None = None,
    exclude_special_tokens: SpecialTokens = False,
    names_filter: NamesFilter = None,
    remove_batch_dim: bool = False,
    **model_kwargs: Any,  # noqa: ANN401 - what `trace` takes
) -> tuple[Float[Tensor, "batch seq vocabulary"], dict[str, Tensor]]:
    """Run one forward pass with SAEs spliced in; return the logits and the values on the way.

    The values of an SAE are named as SAE-Lens names them: `blocks.2.hook_resid_post.hook_sae_acts_post`, and so on for
    `hook_sae_input`, `hook_sae_recons`, `hook_sae_error` and `hook_sae_output`. The model's own hooks are those of the
    language model; name those of the vision tower in `names_filter` to have them.

    Args:
        model: The model.
        *model_args: Chat messages, or what else `model.trace` takes.
        saes: One SAE or several.
        reset_saes_end: Leave the model as it was found.
        use_error_term: Whether to add what an SAE does not reconstruct; None: as each SAE has it.
        exclude_special_tokens: Let control tokens bypass the SAEs.
        names_filter: Which values to keep.
        remove_batch_dim: Take the values' first dimension away; for a batch of one.
        **model_kwargs: The model's inputs: `run_with_cache_with_saes(model, **batch, saes=[sae])`.

    Raises:
        SelectionError: the batch dimension cannot be removed, or a hook is not reached.
    """
    keep = _filter(names_filter)
    cache: dict[str, Tensor] = {}
    attachments = _attachments(model, saes, use_error_term, exclude_special_tokens, cache=cache, keep=keep)
    taken = {attachment.hook.name for attachment in attachments}
    names = [point.name for point in _readable(model, names_filter) if point.name not in taken and keep(point.name)]
    found: list[Tensor] = []

    def read(name: str) -> None:
        cache[name] = model.hooks[name].detach().clone()

    def read_logits() -> None:
        found.append(model.output.logits)

    try:
        with _attached(model, attachments, reset=reset_saes_end), model.trace() as tracer:
            with tracer.invoke(*model_args, **model_kwargs):
                pass
            for name in names:
                with tracer.invoke():
                    read(name)
            with tracer.invoke():
                read_logits()
    except OutOfOrderError as error:
        missing = [name for name in names if name not in cache]
        raise SelectionError(f"The forward pass did not reach {', '.join(missing) or 'its end'}.") from error
    if remove_batch_dim and any(len(value) != 1 for value in cache.values()):
        raise SelectionError("Got remove_batch_dim=True for a batch of several rows; expected one.")
    return found[0], {name: value[0] if remove_batch_dim else value for name, value in cache.items()}


def reset_saes(model: VisionLanguageModel, act_names: str | Sequence[str] | None = None) -> None:
    """Take attached SAEs away: those at some hooks, or all. Other edits of the model stay."""
    chosen = [act_names] if isinstance(act_names, str) else act_names
    names = None if chosen is None else {model.hooks.resolve(name).name for name in chosen}

    def stays(edit: Any) -> bool:  # noqa: ANN401 - nnsight's mediator
        attachment = _attachment_of(edit)
        return attachment is None or (names is not None and attachment.hook.name not in names)

    model._edits[:] = [edit for edit in model._edits if stays(edit)]


@dataclass(frozen=True)
class Attachment:
    """One SAE at its hook, as an edit replays it."""

    hook: HookPoint
    sae: SAE[Any]
    use_error_term: bool
    excluded: tuple[int, ...]
    """Token ids that bypass the SAE."""
    cache: dict[str, Tensor] | None = field(default=None, repr=False)
    """Where the SAE's values go."""
    keep: Callable[[str], bool] = field(default=lambda name: True, repr=False)

    def run(self, model: VisionLanguageModel) -> None:
        """Splice the SAE into every forward pass of a run, from within an nnsight edit."""
        if detect_fake_mode() is not None:
            return
        try:
            for _ in Iterations():
                mask = None
                if self.excluded:
                    _, inputs = model.inputs
                    ids = inputs["input_ids"]
                    mask = torch.isin(ids, torch.as_tensor(self.excluded, device=ids.device))
                model.hooks[self.hook.name] = self.spliced(model.hooks[self.hook.name], mask)
        except OutOfOrderError:
            # The loop asks for one pass more than there is.
            return

    def spliced(self, value: Tensor, mask: Bool[Tensor, "batch seq"] | None) -> Tensor:
        """Return what the SAE makes of a hook's value; masked tokens stay as they are."""
        given = value.to(self.sae.W_dec.device, self.sae.dtype)
        with _error_term(self.sae, self.use_error_term):
            if self.cache is None:
                out = _in_chunks(self.sae, given)
            else:
                out, own = self.sae.run_with_cache(given)
                kept = {f"{self.hook.name}.{name}": one for name, one in own.items()}
                self.cache.update({name: one.detach() for name, one in kept.items() if self.keep(name)})
        out = out.to(value.device, value.dtype)
        if mask is None:
            return out
        spread = mask.to(value.device).reshape(*mask.shape, *[1] * (value.dim() - mask.dim()))
        return torch.where(spread, value, out)


def _in_chunks(sae: SAE[Any], given: Tensor) -> Tensor:
    """The SAE's own forward, for so many tokens at once that their features fit into memory."""
    flat = given.flatten(0, 1)
    if len(flat) <= CHUNK_TOKENS:
        whole: Tensor = sae(given)
        return whole
    parts = [sae(flat[start : start + CHUNK_TOKENS][None])[0] for start in range(0, len(flat), CHUNK_TOKENS)]
    return torch.cat(parts).reshape(given.shape)


def _attachments(
    model: VisionLanguageModel,
    saes: SAE[Any] | Sequence[SAE[Any]],
    use_error_term: bool | None,
    exclude_special_tokens: SpecialTokens,
    *,
    cache: dict[str, Tensor] | None = None,
    keep: Callable[[str], bool] = lambda name: True,
) -> list[Attachment]:
    special = get_special_token_ids(model.tokenizer) if exclude_special_tokens is True else exclude_special_tokens or []
    attachments = []
    for sae in [saes] if isinstance(saes, SAE) else saes:
        hook = model.hooks.resolve(check_sae(model, sae))
        wanted = bool(sae.use_error_term) if use_error_term is None else use_error_term
        excluded = tuple(int(one) for one in special) if hook.tower == "language" else ()
        attachments.append(Attachment(hook, inference_sae(sae), wanted, excluded, cache, keep))
    return attachments


@contextmanager
def _attached(model: VisionLanguageModel, attachments: Sequence[Attachment], *, reset: bool) -> Iterator[None]:
    before = list(model._edits)
    try:
        for attachment in attachments:
            reset_saes(model, attachment.hook.name)
            _attach(model, attachment)
        yield
    finally:
        if reset:
            ours = {id(attachment) for attachment in attachments}
            added = [edit for edit in model._edits if edit not in before and id(_attachment_of(edit)) not in ours]
            model._edits[:] = [*before, *added]


def _attach(model: VisionLanguageModel, attachment: Attachment) -> None:
    with model.edit(inplace=True) as _:
        attachment.run(model)


def _attachment_of(edit: Any) -> Attachment | None:  # noqa: ANN401 - nnsight's mediator
    attachment = edit.lcls.get("attachment")
    return attachment if isinstance(attachment, Attachment) else None


@contextmanager
def _error_term(sae: SAE[Any], use: bool) -> Iterator[None]:
    # The property's setter warns that the hooked transformer should be used instead, whose part this plays.
    before = sae._use_error_term
    sae._use_error_term = use
    try:
        yield
    finally:
        sae._use_error_term = before


def _filter(names: NamesFilter) -> Callable[[str], bool]:
    if names is None:
        return lambda name: True
    if callable(names):
        return names
    chosen = {names} if isinstance(names, str) else set(names)
    return lambda name: name in chosen


def _readable(model: VisionLanguageModel, names: NamesFilter) -> list[HookPoint]:
    """Return the hooks that may be kept: those of the language model that the model computes, or those named."""
    points = model.hooks.points()
    if names is None or callable(names):
        return [point for point in points if point.tower == "language" and not point.needs]
    return points
