"""Which tokens of which forward pass an intervention is about, worked out from the model's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, assert_never, cast, get_args

import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from sae_lens_multimodal.adapters.batch import known_picture_sizes
from sae_lens_multimodal.adapters.encode import build_layout, special_ids
from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import LayoutError, SelectionError
from sae_lens_multimodal.hooks.places import BoxTokens, ImageTokens

TokenName: TypeAlias = Literal["all", "image", "text", "last"]
"""`all` but padding; `image` patches; ordinary `text`; the `last` token of each row that is not padding."""

StepName: TypeAlias = Literal["all", "prefill", "decoding"]
"""Every forward pass; the first, over the prompt; those after it, over generated tokens."""

Steps: TypeAlias = "StepName | range"
"""Forward passes by name or by number: 0 is the prompt's, n the one that reads the n-th generated token."""

LayoutMask: TypeAlias = Callable[[TokenLayout], Bool[Tensor, "batch seq"]]
"""A function from the layout of a forward pass to the positions meant."""

Tokens: TypeAlias = (
    "TokenName | ImageTokens | BoxTokens | Bool[Tensor, 'batch seq'] | Bool[Tensor, ' seq'] | Int[Tensor, ' n']"
    " | Sequence[int] | LayoutMask"
)
"""A choice of tokens: by name, by picture or box, by mask, by position in the row, or by a function of the layout."""


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass of a run, as far as it tells where the pictures are."""

    inputs: Mapping[str, Any]
    """The model's inputs in this pass."""
    step: int
    """0 for the pass over the prompt, then one for each generated token."""
    picture_sizes: Sequence[tuple[int, int]] = ()
    """(width, height) of all pictures of the run, prompt by prompt."""
    n_prompts: int = 0
    """Prompts of the run; the pass has several rows for each where beams or samples share one. 0: as many as rows."""
    prompt_tokens: int = 0
    """Positions of the prompt, padding included. 0: not known, so that a pass is the prompt or one after it."""

    @property
    def prompts(self) -> int:
        """Prompts that its rows are of."""
        return self.n_prompts or _shape(self)[0]

    @classmethod
    def current(cls, model: VisionLanguageModel, step: int, prompt_tokens: int = 0) -> ForwardPass:
        """Wait, within a trace or an edit, for the model's next forward pass.

        Only the first pass of a run finds the length of the prompt by itself; those after it are told.

        `generate` runs the vision tower by itself and does not tell the model how large the pictures are, so that is
        taken from what the run was given.
        """
        _, inputs = model.inputs
        return cls.of(model, inputs, step, prompt_tokens)

    @classmethod
    def of(
        cls, model: VisionLanguageModel, inputs: Mapping[str, Any], step: int, prompt_tokens: int = 0
    ) -> ForwardPass:
        """Describe a pass of the run that the model is in by the pass's inputs; see `current`."""
        batcher = model.interleaver.batcher
        sizes: list[tuple[int, int]] = []
        if step == 0 or _reads_all(inputs, prompt_tokens + step):
            given = [{**_mapping(args), **kwargs} for args, kwargs in batcher.invokes]
            found = [known_picture_sizes(one) or model.family.picture_sizes(one) for one in given]
            sizes = [size for one in found for size in one or ()]
        forward = cls(inputs, step, sizes, n_prompts=batcher.total)
        return replace(forward, prompt_tokens=_shape(forward)[1] if step == 0 else prompt_tokens)

    def parts(self) -> list[ForwardPass]:
        """The passes that this one stands for: itself, or those of cached decoding.

        Without a cache every pass reads the prompt and all tokens generated so far again.
        """
        length = _shape(self)[1]
        if not self.step or not self.prompt_tokens or length < self.prompt_tokens + self.step:
            return [self]
        later = range(self.prompt_tokens, length)
        return [
            self._columns(slice(0, self.prompt_tokens), step=0),
            *(self._columns(slice(at, at + 1), step=number) for number, at in enumerate(later, start=1)),
        ]

    def _columns(self, columns: slice, step: int) -> ForwardPass:
        cut = {name: self.inputs[name][:, columns] for name in _TOKENS if self.inputs.get(name) is not None}
        return replace(self, inputs={**cut, "attention_mask": _attention(self)[:, columns]}, step=step)


_TOKENS = ("input_ids", "inputs_embeds")
"""The model's inputs of which there is one for each token."""


def _mapping(args: Sequence[Any]) -> Mapping[str, Any]:
    return args[0] if args and isinstance(args[0], Mapping) else {}


def _reads_all(inputs: Mapping[str, Any], length: int) -> bool:
    """Whether a pass reads the prompt again, as all do without a cache."""
    tokens = next((inputs[name] for name in _TOKENS if inputs.get(name) is not None), None)
    return tokens is not None and tokens.shape[1] >= length


@dataclass(frozen=True)
class TokenSelection:
    """A checked choice of tokens and steps."""

    tokens: TokenName | ImageTokens | BoxTokens | Tensor | LayoutMask
    """As chosen; positions and masks as tensors."""
    steps: Steps
    """As chosen."""
    family: Family
    """Knows which tokens are pictures'."""

    @classmethod
    def check(cls, tokens: Tokens, steps: Steps, family: Family) -> TokenSelection:
        """Check a choice as far as it can be without a prompt.

        Raises:
            SelectionError: it is none of the known kinds, or can select nothing.
        """
        _check_steps(steps)
        if isinstance(tokens, str) and tokens not in get_args(TokenName):
            raise SelectionError(
                f"Got tokens={tokens!r}; expected one of {', '.join(get_args(TokenName))}, ImageTokens, BoxTokens, a "
                "mask, positions or a function of the layout."
            )
        if isinstance(tokens, str | ImageTokens | BoxTokens):
            if isinstance(tokens, ImageTokens | BoxTokens):
                tokens.check()
            if tokens not in _WHILE_DECODING and not _includes(steps, 0):
                raise SelectionError(
                    f"Got tokens={tokens!r} with steps={steps!r}; generated tokens are never a picture's."
                )
            return cls(tokens, steps, family)
        if callable(tokens):
            return cls(tokens, steps, family)
        return cls(_as_tensor(tokens, steps), steps, family)

    def mask(self, forward: ForwardPass) -> Bool[Tensor, "batch seq"] | None:
        """Return the chosen positions of one forward pass; None where it has none.

        A pass that reads the prompt again, as all do without a cache, has those that cached decoding would have.

        Raises:
            SelectionError: the choice does not fit this pass.
        """
        parts = forward.parts()
        masks = [self._mask(part) for part in parts]
        if all(mask is None for mask in masks):
            return None
        whole = [
            torch.zeros(_shape(part), dtype=torch.bool) if mask is None else mask.cpu()
            for part, mask in zip(parts, masks, strict=True)
        ]
        return torch.cat(whole, dim=1) if len(whole) > 1 else masks[0]

    @property
    def spelt(self) -> str:
        """The choice of tokens, for messages."""
        if isinstance(self.tokens, str):
            return f"tokens={self.tokens!r}"
        if isinstance(self.tokens, Tensor):
            return "The mask" if self.tokens.dtype == torch.bool else f"tokens={self.tokens.tolist()}"
        return repr(self.tokens) if isinstance(self.tokens, ImageTokens | BoxTokens) else "The function of the layout"

    @property
    def is_about_prompts(self) -> bool:
        """Whether nothing can be chosen but tokens of the prompt."""
        if isinstance(self.tokens, Tensor | ImageTokens | BoxTokens) or self.tokens == "image":
            return True
        later = range(1, max(self.steps.stop, 2)) if isinstance(self.steps, range) else (1,)
        return not any(_includes(self.steps, step) for step in later)

    def _mask(self, forward: ForwardPass) -> Bool[Tensor, "batch seq"] | None:
        prefill = forward.step == 0
        if not _includes(self.steps, forward.step):
            return None
        if isinstance(self.tokens, Tensor):
            return _fitted(self.tokens, forward) if prefill else None
        if isinstance(self.tokens, BoxTokens):
            return self.tokens.mask(layout_of(self.family, forward), forward.prompts) if prefill else None
        if isinstance(self.tokens, ImageTokens):
            return self.tokens.mask(layout_of(self.family, forward)) if prefill else None
        if callable(self.tokens):
            return _checked_mask(self.tokens(layout_of(self.family, forward)), forward)
        match self.tokens:
            case "all":
                return _attention(forward) != 0
            case "last":
                return _last(_attention(forward) != 0)
            case "image":
                return layout_of(self.family, forward).is_image if prefill else None
            case "text":
                return layout_of(self.family, forward).is_text
            case _:
                assert_never(self.tokens)


_WHILE_DECODING = ("all", "text", "last")
"""Choices that can mean generated tokens."""


def _includes(steps: Steps, step: int) -> bool:
    """Whether a choice of steps means a forward pass, by its number."""
    if isinstance(steps, range):
        return step in steps
    match steps:
        case "all":
            return True
        case "prefill":
            return step == 0
        case "decoding":
            return step > 0
        case _:
            assert_never(steps)


def _check_steps(steps: object) -> None:
    if isinstance(steps, range):
        if not steps or min(steps) < 0:
            raise SelectionError(
                f"Got steps={steps!r}; expected a range that is not empty and starts at 0 (the prompt) or later."
            )
    elif steps not in get_args(StepName):
        raise SelectionError(f"Got steps={steps!r}; expected one of {', '.join(get_args(StepName))}, or a range.")


def layout_of(family: Family, forward: ForwardPass) -> TokenLayout:
    """Work out the layout of a forward pass, which does not know the batch it was encoded as.

    Raises:
        SelectionError: the pass has no token ids, or the pictures' sizes are not known.
    """
    ids = forward.inputs.get("input_ids")
    if ids is None:
        raise SelectionError(
            "The model was given embeddings instead of token ids, which do not tell images from text; give a mask."
        )
    if forward.step:
        # A placeholder that the model itself generates stands for no picture: it is a control token like others.
        control = special_ids(family.processor.tokenizer)[0]
        return build_layout(
            family, ids.masked_fill(_placeholders(family, ids), control), _attention(forward), [[]] * len(ids)
        )
    copies = len(ids) // forward.n_prompts if forward.n_prompts else 1
    counts = _placeholders(family, ids[::copies]).sum(-1).tolist()
    pictures = [one for one in _share_out(family, counts, list(forward.picture_sizes)) for _ in range(copies)]
    try:
        return build_layout(family, ids, _attention(forward), cast("list[list[Image.Image]]", pictures))
    except LayoutError as error:
        raise SelectionError(f"It is not clear where the images are ({error}); choose tokens by a mask.") from error


def _placeholders(family: Family, ids: Tensor) -> Tensor:
    return torch.from_numpy(family.is_placeholder(ids.cpu().numpy())).to(ids.device)


def _share_out(family: Family, counts: Sequence[int], sizes: list[tuple[int, int]]) -> list[list[_Sized]]:
    """Give each row the pictures that its number of image tokens calls for."""
    rows: list[list[_Sized]] = []
    for row, count in enumerate(counts):
        # how many tokens a picture has may depend on how many others the prompt has
        taken = next((n for n in range(len(sizes) + 1) if _tokens_of(family, sizes[:n]) == count), None)
        if taken is None:
            raise SelectionError(
                f"Row {row} has image tokens for which the run was given no picture sizes; choose tokens by a "
                "mask, such as tokens=batch.layout.is_image."
            )
        rows.append([_Sized(size) for size in sizes[:taken]])
        del sizes[:taken]
    return rows


def _tokens_of(family: Family, sizes: Sequence[tuple[int, int]]) -> int:
    return sum(map(len, family.row_tokens(sizes)))


@dataclass(frozen=True)
class _Sized:
    """All that the layout needs of a picture."""

    size: tuple[int, int]


def _as_tensor(tokens: Tensor | Sequence[int], steps: Steps) -> Tensor:
    try:
        chosen = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SelectionError(
            f"Got tokens of type {type(tokens).__name__}; expected a name, a mask, positions or a function."
        ) from error
    if not chosen.numel() or (chosen.dtype == torch.bool and not chosen.any()):
        raise SelectionError("Got tokens that select nothing; expected at least one position.")
    if chosen.dtype != torch.bool and (chosen.is_floating_point() or chosen.is_complex() or chosen.dim() != 1):
        raise SelectionError(
            f"Got tokens of type {chosen.dtype} and shape {tuple(chosen.shape)}; expected a mask of bool, or positions "
            "as a list of integers."
        )
    if chosen.dtype == torch.bool and chosen.dim() not in (1, 2):
        raise SelectionError(f"Got a mask of shape {tuple(chosen.shape)}; expected [batch, seq] or [seq].")
    if not _includes(steps, 0):
        raise SelectionError(
            f"Got a mask or positions with steps={steps!r}; they are about the prompt. Use steps='prefill'."
        )
    return chosen


def _fitted(tokens: Tensor, forward: ForwardPass) -> Tensor:
    """Bring a mask or positions to the prompt's shape."""
    rows, length = _shape(forward)
    if tokens.dtype == torch.bool:
        whole = tokens if tokens.dim() == 2 else tokens.expand(rows, -1)
        return _checked_mask(_repeated(whole, forward), forward)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row, attended in enumerate(_attention(forward) != 0):
        places = attended.nonzero()[:, 0]
        outside = (tokens >= len(places)) | (tokens < -len(places))
        if bool(outside.any()):
            raise SelectionError(
                f"Got position {int(tokens[outside][0])}; the prompt in row {row} has {len(places)} tokens besides "
                f"padding, so expected {-len(places)} to {len(places) - 1}."
            )
        mask[row, places[tokens.long().cpu()]] = True
    return mask


def _checked_mask(mask: object, forward: ForwardPass) -> Tensor:
    shape = _shape(forward)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise SelectionError(f"Got a mask of {got} for a forward pass of {shape[0]} rows of {shape[1]} tokens.")
    return mask


def _repeated(mask: Tensor, forward: ForwardPass) -> Tensor:
    """Repeat each prompt's mask for its beams or samples, which lie side by side."""
    copies = _shape(forward)[0] // forward.prompts if len(mask) == forward.prompts else 1
    return mask.repeat_interleave(copies, dim=0)


def _shape(forward: ForwardPass) -> tuple[int, int]:
    for name in _TOKENS:
        tokens = forward.inputs.get(name)
        if tokens is not None:
            return int(tokens.shape[0]), int(tokens.shape[1])
    raise SelectionError(f"The model was given {', '.join(forward.inputs)}; expected input_ids or inputs_embeds.")


def _attention(forward: ForwardPass) -> Tensor:
    """The attention mask of the tokens of this pass; while decoding the model's covers those before as well."""
    shape = _shape(forward)
    mask = forward.inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return torch.ones(shape, dtype=torch.long)
    return torch.as_tensor(mask[:, -shape[1] :]).cpu()


def _last(attended: Tensor) -> Tensor:
    """The last attended position of each row."""
    following = attended.flip(-1).cumsum(-1).flip(-1)
    return attended & (following == 1)
