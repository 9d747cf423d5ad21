"""Candidates for control: what attribution foretells of raising or ablating each feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import SelectionError
from sae_lens_multimodal.hooks.control_questions import Questions, RowDifference, encoded_batches, selected
from sae_lens_multimodal.hooks.control_records import Control
from sae_lens_multimodal.hooks.gradients import metric_and_gradient
from sae_lens_multimodal.hooks.saes import decoder_directions, inference_sae, output_scale
from sae_lens_multimodal.hooks.selection import Tokens
from sae_lens_multimodal.hooks.value_parts import ValueParts


@dataclass(frozen=True)
class Foreseen:
    """What attribution foretells of each feature: a mean over examples of the change in the logit difference."""

    raised: Float[Tensor, " d_sae"]
    """If the feature is set to its scale at every chosen token."""
    ablated: Float[Tensor, " d_sae"]
    """If it is ablated at every chosen token."""


def foresee(
    model: VisionLanguageModel,
    sae: SAE[Any],
    hook_name: str,
    questions: Questions,
    wanted: Int[Tensor, " examples"],
    unwanted: Int[Tensor, " examples"],
    tokens: Tokens,
    scale: Float[Tensor, " d_sae"],
    *,
    batch_size: int = 2,
) -> Foreseen:
    """Attribute the logit difference of all examples to all features, active or not.

    Examples are encoded anew, `batch_size` at a time: a backward pass needs many times the memory of a forward pass.

    Raises:
        SelectionError: no example has any of the tokens.
    """
    plain, start, n_chosen = inference_sae(sae), 0, 0
    unit, ablated = torch.zeros(sae.cfg.d_sae), torch.zeros(sae.cfg.d_sae)
    directions = decoder_directions(plain, range(sae.cfg.d_sae)).detach()
    for batch, chosen in selected(model, encoded_batches(model, questions.examples, batch_size), tokens):
        rows = slice(start, start + batch.n_rows)
        start, n_chosen = rows.stop, n_chosen + int(chosen.sum())
        if not bool(chosen.any()):
            continue
        metric = RowDifference(wanted[rows], unwanted[rows])
        _, acts, gradient = metric_and_gradient(model, batch, hook_name, metric)
        slopes = gradient[chosen.to(gradient.device)]
        effects = ValueParts.of(sae, acts, chosen).effects(sae, slopes)
        ablated.index_add_(0, effects.feature, effects.effect.float())
        stretch = output_scale(plain, acts[chosen.to(acts.device)])
        total = (slopes if stretch is None else slopes * stretch).sum(0)
        unit += (directions @ total.to(directions)).float().cpu()
    if not n_chosen:
        raise SelectionError(f"Got tokens={tokens!r}, which select nothing in the examples; expected at least one.")
    n = max(len(questions), 1)
    return Foreseen(raised=(unit * scale + ablated) / n, ablated=ablated / n)


def propose(foreseen: Foreseen, scale: Float[Tensor, " d_sae"], n: int) -> list[tuple[Control, float]]:
    """The changes of single features that attribution foretells most of, with what it foretells."""
    raised = torch.where(scale > 0, foreseen.raised, torch.zeros_like(scale))
    gains = torch.stack([raised, foreseen.ablated]).flatten()
    found = []
    for place in gains.argsort(descending=True, stable=True)[:n].tolist():
        if gains[place] <= 0:
            break
        feature, up = place % len(scale), place < len(scale)
        control = Control(
            feature=feature,
            direction="raise" if up else "ablate",
            strength=1.0 if up else 0.0,
            scale=float(scale[feature]),
        )
        found.append((control, float(gains[place])))
    return found
