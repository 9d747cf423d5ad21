"""What a model's predictions lose when activations are replaced: cross-entropy and KL over text targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks.metrics import can_shorten_logits
from sae_lens_multimodal.hooks.saes import reconstruct_tokens
from sae_lens_multimodal.training.tokens import GROUP_OF_MODALITY, LabelledBatch, TokenChoice, within_norm_ratio
from sae_lens_multimodal.types import Modality

PLACES = ("image", "text", "both")
"""At which tokens activations are replaced."""
ZERO, MEAN = "zero", "mean"
"""The floors: activations replaced by zero, and by the mean of their modality."""
_CHUNK_TARGETS = 256
"""Targets whose probabilities over the whole vocabulary exist at once."""

Replace: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Makes new activations [n, d] from old ones and the `Modality` of each token [n]."""


def text_targets(layout: TokenLayout) -> Bool[Tensor, "batch seq-1"]:
    """Mark the positions that predict ordinary text: the next token is text, and the position itself is no padding."""
    attended = layout.modality != Modality.PADDING
    return layout.is_text[:, 1:] & attended[:, :-1]


def replaced_tokens(layout: TokenLayout, chosen: Bool[Tensor, "batch seq"], place: str) -> Bool[Tensor, "batch seq"]:
    """Mark the tokens of a place, among those that the SAE is for."""
    if place == "both":
        return chosen
    codes = [int(code) for code, group in GROUP_OF_MODALITY.items() if group == place]
    return chosen & torch.isin(layout.modality, torch.tensor(codes, dtype=layout.modality.dtype))


def by_zero(activations: Float[Tensor, "n d"], modality: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """Replace by zero."""
    return torch.zeros_like(activations)


def by_mean(means: Mapping[str, Float[Tensor, " d"]]) -> Replace:
    """Replace by the mean of the token's modality; separators between rows of patches belong to the image."""

    def replace(activations: Tensor, modality: Tensor) -> Tensor:
        replaced = activations.clone()
        for code, group in GROUP_OF_MODALITY.items():
            if group in means:
                replaced[(modality == code).to(activations.device)] = means[group].to(replaced)
        return replaced

    return replace


def by_sae(sae: SAE[Any]) -> Replace:
    """Replace by an SAE's reconstruction; its error is dropped."""

    def replace(activations: Tensor, modality: Tensor) -> Tensor:
        return reconstruct_tokens(sae, activations).to(activations.dtype)

    return replace


@torch.no_grad()
def spliced_logits(
    model: VisionLanguageModel,
    batch: EncodedBatch,
    hook_name: str,
    replace: Replace | None = None,
    where: Bool[Tensor, "batch seq"] | None = None,
    *,
    max_norm_ratio: float | None = None,
) -> Float[Tensor, "targets vocabulary"]:
    """Logits for all text targets of a batch, row by row, with some tokens' activations replaced at a hook.

    Args:
        model: the model.
        batch: the prompts.
        hook_name: where activations are replaced.
        replace: makes the new ones; None to leave all as they are.
        where: the tokens, of the batch's shape; None for none.
        max_norm_ratio: leave tokens alone whose norm is more than so many times the median of their modality.
    """
    targets = text_targets(batch.layout)
    # Only columns in which some row predicts text: most logits of a prompt with pictures are never looked at.
    columns = targets.any(0).nonzero().squeeze(1)
    narrow = can_shorten_logits(model) and len(columns) > 0
    if not narrow:
        columns = torch.arange(targets.shape[1])
    inputs: dict[str, Any] = {**batch.to(model.device)}
    if narrow:
        inputs["logits_to_keep"] = columns.to(model.device)
    chosen = targets[:, columns]

    def spliced() -> Tensor:
        value: Tensor = model.hooks[hook_name]
        return _replaced(value, batch.layout.modality, where, replace, max_norm_ratio)

    if replace is None or where is None or not bool(where.any()):
        with model.trace(**inputs):
            logits = _at_targets(model.output.logits, chosen).save()  # type: ignore[attr-defined]
    else:
        with model.trace(**inputs):
            model.hooks[hook_name] = spliced()
            logits = _at_targets(model.output.logits, chosen).save()  # type: ignore[attr-defined]
    return logits


def _at_targets(logits: Tensor, chosen: Bool[Tensor, "batch columns"]) -> Tensor:
    return logits[:, : chosen.shape[1]][chosen.to(logits.device)]


def _replaced(
    value: Tensor, modality: Tensor, where: Tensor | None, replace: Replace | None, max_norm_ratio: float | None
) -> Tensor:
    assert where is not None and replace is not None
    flat = value.flatten(2) if value.dim() > 3 else value
    rows, labels = flat[where.to(flat.device)], modality[where]
    replaced = replace(rows, labels).to(flat.dtype)
    if max_norm_ratio is not None:
        kept = within_norm_ratio(LabelledBatch(rows, labels), max_norm_ratio).to(flat.device)
        replaced = torch.where(kept[:, None], replaced, rows)
    spliced = flat.clone()
    spliced[where.to(flat.device)] = replaced
    return spliced.reshape(value.shape)


def target_losses(
    logits: Float[Tensor, "n vocabulary"],
    labels: Int[Tensor, " n"],
    reference: Float[Tensor, "n vocabulary"] | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Cross-entropy of each target, and KL(reference ‖ logits); zeros without a reference.

    >>> ce, kl = target_losses(torch.zeros(1, 4), torch.tensor([2]), torch.zeros(1, 4))
    >>> round(ce.item(), 4), kl.item()                      # log 4
    (1.3863, 0.0)
    """
    entropies, divergences = [torch.zeros(0)], [torch.zeros(0)]
    for start in range(0, len(labels), _CHUNK_TARGETS):
        part = slice(start, start + _CHUNK_TARGETS)
        log_p = logits[part].float().log_softmax(-1)
        entropies.append(-log_p.gather(1, labels[part, None].to(log_p.device)).squeeze(1).cpu())
        if reference is None:
            divergences.append(torch.zeros(len(log_p)))
        else:
            log_q = reference[part].float().log_softmax(-1)
            divergences.append((log_q.exp() * (log_q - log_p)).sum(-1).cpu())
    return torch.cat(entropies), torch.cat(divergences)


@dataclass
class _Sum:
    ce: float = 0.0
    kl: float = 0.0

    def add(self, ce: Tensor, kl: Tensor) -> None:
        self.ce += ce.double().sum().item()
        self.kl += kl.double().sum().item()


@dataclass
class LossTotals:
    """Running sums of losses, by place and by what activations are replaced with."""

    names: tuple[str, ...]
    """What is spliced in, the floors included."""
    n_targets: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))
    clean: dict[str, _Sum] = field(default_factory=lambda: {place: _Sum() for place in PLACES})
    spliced: dict[tuple[str, str], _Sum] = field(default_factory=dict)

    def report(self) -> dict[str, dict[str, Any]]:
        """The means by place, as JSON values; see `splice_losses`."""
        return {place: self._of_place(place) for place in PLACES}

    def _of_place(self, place: str) -> dict[str, Any]:
        count = self.n_targets[place]
        if not count:
            return {"n_targets": 0}
        ce = self.clean[place].ce / count
        found: dict[str, Any] = {"n_targets": count, "ce": ce}
        means = {name: self.spliced[name, place] for name in self.names}
        floors = {floor: means[floor].ce / count for floor in (ZERO, MEAN)}
        for name, total in means.items():
            found[name] = {"ce": total.ce / count, "kl": total.kl / count}
            if name not in floors:
                for floor, worst in floors.items():
                    found[name][f"recovered_from_{floor}"] = recovered(ce, total.ce / count, worst)
        return found


def recovered(without: float, spliced: float, floor: float) -> float | None:
    """Share of the loss between a floor and the untouched model that a splice keeps; None if the floor loses nothing.

    >>> recovered(1.0, 1.5, 3.0)
    0.75
    """
    return (floor - spliced) / (floor - without) if floor > without else None


@torch.no_grad()
def splice_losses(
    model: VisionLanguageModel,
    replacements: Mapping[str, Replace],
    means: Mapping[str, Float[Tensor, " d"]],
    batches: Iterable[EncodedBatch],
    *,
    hook_name: str,
    choice: TokenChoice | None = None,
) -> dict[str, dict[str, Any]]:
    """Losses over text targets with activations replaced at image tokens, at text tokens, and at both.

    Of each place only prompts count that have such tokens, so a dataset's prompts without pictures do not dilute what
    replacing image tokens does; the loss without any splice is given for the same prompts.

    Args:
        model: the model.
        replacements: what to splice in, by name: `{"sae": by_sae(sae)}`.
        means: the mean activation of each modality, for the floor.
        batches: the prompts.
        hook_name: where.
        choice: which tokens the SAE is for; None for all image and text tokens.

    Returns:
        For each of `PLACES`: `n_targets`, `ce` (without splice), and for each name and the floors "zero" and "mean" its
        `ce` and `kl` (from the untouched model's predictions); for each name also `recovered_from_zero` and
        `recovered_from_mean`: (floor - spliced) / (floor - without) of the cross-entropies.
    """
    every = {**replacements, ZERO: by_zero, MEAN: by_mean(means)}
    totals = LossTotals(tuple(every))
    totals.spliced = {(name, place): _Sum() for name in every for place in PLACES}
    for batch in batches:
        _add_batch(model, batch, hook_name, choice or TokenChoice(), every, totals)
    return totals.report()


def _add_batch(
    model: VisionLanguageModel,
    batch: EncodedBatch,
    hook_name: str,
    choice: TokenChoice,
    every: Mapping[str, Replace],
    totals: LossTotals,
) -> None:
    targets = text_targets(batch.layout)
    if not bool(targets.any()):
        return
    ids = batch["input_ids"].cpu()
    labels = ids[:, 1:][targets]
    row_of_target = targets.nonzero()[:, 0]
    chosen = choice.select(batch.layout, ids)
    clean = spliced_logits(model, batch, hook_name)
    clean_ce, nothing = target_losses(clean, labels)
    for place in PLACES:
        where = replaced_tokens(batch.layout, chosen, place)
        counted = where.any(1)[row_of_target]
        if not bool(counted.any()):
            continue
        totals.n_targets[place] += int(counted.sum())
        totals.clean[place].add(clean_ce[counted], nothing[counted])
        for name, replace in every.items():
            logits = spliced_logits(model, batch, hook_name, replace, where, max_norm_ratio=choice.max_norm_ratio)
            ce, kl = target_losses(logits, labels, clean)
            totals.spliced[name, place].add(ce[counted], kl[counted])
