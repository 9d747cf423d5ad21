"""Which tokens of a prompt are trained on, and their activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.training.config import ImageTokens
from sae_lens_multimodal.training.patches import choose_patches
from sae_lens_multimodal.types import Modality

GROUP_OF_MODALITY = {Modality.IMAGE: "image", Modality.NEWLINE: "image", Modality.TEXT: "text"}
"""To which share a token counts: separators between rows of patches belong to the image."""


class LabelledBatch(NamedTuple):
    """Activations of some tokens, and what the tokens are."""

    activations: Float[Tensor, "n d"]
    """Activations at the hook."""
    modality: Int[Tensor, " n"]
    """`Modality` of each token, int8, on the CPU."""


@dataclass(frozen=True)
class TokenChoice:
    """Which tokens are taken; special tokens and padding never are."""

    image_tokens: ImageTokens = "all"
    """All image tokens, or those of the base view or of the tiles only."""
    newline_tokens: bool = False
    """Whether separators between rows of patches are taken too, where their part of the image is."""
    excluded_ids: tuple[int, ...] = ()
    """Token ids to leave out besides."""
    max_norm_ratio: float | None = None
    """Leave out tokens whose norm is more than so many times the median of their modality; None keeps all."""

    def select(self, layout: TokenLayout, input_ids: Int[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
        """Mark the tokens that are taken, from where each comes from and from its id."""
        of_image = layout.modality == Modality.IMAGE
        if self.newline_tokens:
            of_image = of_image | (layout.modality == Modality.NEWLINE)
        if self.image_tokens == "base":
            of_image = of_image & (layout.tile == 0)
        elif self.image_tokens == "tiles":
            of_image = of_image & (layout.tile != 0)
        chosen = of_image | (layout.modality == Modality.TEXT)
        if self.excluded_ids:
            chosen = chosen & ~torch.isin(input_ids, torch.tensor(self.excluded_ids))
        return chosen


def read_tokens(
    model: VisionLanguageModel,
    batch: EncodedBatch,
    hook_name: str,
    choice: TokenChoice,
    *,
    autocast: bool = False,
    outliers: Counter[str] | None = None,
) -> LabelledBatch:
    """Run a model up to a hook, and keep the tokens that are chosen.

    At a hook of the vision tower or the projector the tokens are the patches of the batch's pictures.

    Args:
        model: the model.
        batch: what it is given.
        hook_name: where to read.
        choice: which tokens to keep.
        autocast: whether the model computes in bfloat16.
        outliers: counts the tokens that `choice.max_norm_ratio` leaves out, by modality.

    Raises:
        ConfigError: the hook does not give one vector for each token, or not finite numbers.
    """
    read = read_hooks(model, batch, [hook_name], choice, autocast=autocast)[hook_name]
    if choice.max_norm_ratio is None:
        return read
    kept = within_norm_ratio(read, choice.max_norm_ratio)
    return keep_tokens(read, kept, outliers)


@torch.no_grad()
def read_hooks(
    model: VisionLanguageModel,
    batch: EncodedBatch,
    hook_names: Sequence[str],
    choice: TokenChoice,
    *,
    autocast: bool = False,
) -> dict[str, LabelledBatch]:
    """Run a model once, up to the deepest of several hooks, and keep each one's tokens that are chosen, outliers too.

    All hooks of the language model give the same tokens in the same order, and so do all those of the vision tower
    and the projector.

    Raises:
        ConfigError: a hook does not give one vector for each token, or not finite numbers.
    """
    of_patches = {name: model.hooks.resolve(name).tower != "language" for name in hook_names}
    seen = (batch.layout.image_index >= 0).any().item()
    reached = [name for name in hook_names if seen or not of_patches[name]]
    device = torch.device(model.device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        values = read_activations(model, batch, reached) if reached else {}
    chosen = choice.select(batch.layout, batch["input_ids"].cpu())
    read = {}
    for name in hook_names:
        if name not in values:
            width = model.hooks.resolve(name).d or 0
            nothing = torch.empty(0, width, device=device)
            read[name] = LabelledBatch(nothing, torch.empty(0, dtype=torch.int8))
        elif of_patches[name]:
            read[name] = _of_patches(values[name], batch.layout, choice, name)
        else:
            read[name] = _of_prompt(values[name], batch.layout, chosen, name)
    return read


def _of_prompt(
    values: Float[Tensor, "..."], layout: TokenLayout, chosen: Bool[Tensor, "b s"], name: str
) -> LabelledBatch:
    if values.ndim < 3 or values.shape[:2] != chosen.shape:
        raise ConfigError(
            f"{name} gives values of shape {tuple(values.shape)} for prompts of shape {tuple(chosen.shape)}; "
            "choose a hook of the language model, which has one vector for each token."
        )
    rows = values.flatten(2)[chosen.to(values.device)]
    _check_finite(rows, name)
    return LabelledBatch(rows, layout.modality[chosen].cpu())


def _of_patches(values: Float[Tensor, "..."], layout: TokenLayout, choice: TokenChoice, name: str) -> LabelledBatch:
    chosen = choose_patches(tuple(values.shape), layout, choice.image_tokens, name)
    rows = values.flatten(2)[chosen.to(values.device)]
    _check_finite(rows, name)
    return LabelledBatch(rows, torch.full((len(rows),), int(Modality.IMAGE), dtype=torch.int8))


def _check_finite(rows: Float[Tensor, "n d"], name: str) -> None:
    if not torch.isfinite(rows).all():
        raise ConfigError(
            f"Activations at {name} are not finite in {rows.dtype}; load the model with more range, such as "
            "model_from_pretrained_kwargs={'dtype': 'bfloat16'}."
        )


def within_norm_ratio(batch: LabelledBatch, ratio: float) -> Bool[Tensor, " n"]:
    """Mark the tokens whose norm is at most `ratio` times the median norm of their modality in this batch.

    A few tokens of most models carry norms of a hundred times the others' (massive activations, Sun et al. 2024,
    arXiv 2402.17762), and would own an SAE's loss.

    >>> rows = torch.tensor([[1.0], [2.0], [3.0], [90.0], [95.0], [100.0]])
    >>> modality = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.int8)
    >>> within_norm_ratio(LabelledBatch(rows, modality), 10.0).tolist()
    [True, True, True, False, True, True]
    """
    norms = torch.linalg.vector_norm(batch.activations, dim=1, dtype=torch.float32).cpu()
    kept = torch.ones(len(norms), dtype=torch.bool)
    for codes in _codes_by_group().values():
        mine = torch.isin(batch.modality, torch.tensor(codes, dtype=batch.modality.dtype))
        if mine.any():
            kept[mine] = norms[mine] <= ratio * norms[mine].median()
    return kept


def keep_tokens(batch: LabelledBatch, kept: Bool[Tensor, " n"], dropped: Counter[str] | None = None) -> LabelledBatch:
    """Keep the marked tokens; count the others by modality, where asked to."""
    if dropped is not None:
        for name, codes in _codes_by_group().items():
            mine = torch.isin(batch.modality, torch.tensor(codes, dtype=batch.modality.dtype))
            if lost := int((mine & ~kept).sum()):
                dropped[name] += lost
    if bool(kept.all()):
        return batch
    return LabelledBatch(batch.activations[kept.to(batch.activations.device)], batch.modality[kept])


def _codes_by_group() -> Mapping[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for code, group in GROUP_OF_MODALITY.items():
        groups.setdefault(group, []).append(int(code))
    return groups
