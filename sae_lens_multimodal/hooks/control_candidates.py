"""Candidates for control: how active each feature is, and what attribution foretells of raising or ablating it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks.attribute import chosen_tokens
from sae_lens_multimodal.hooks.control_questions import Questions, RowDifference
from sae_lens_multimodal.hooks.control_records import Control
from sae_lens_multimodal.hooks.gradients import metric_and_gradient, read_hook
from sae_lens_multimodal.hooks.saes import decoder_directions, encode_chunks, inference_sae, output_scale
from sae_lens_multimodal.hooks.selection import Tokens
from sae_lens_multimodal.hooks.value_parts import ValueParts

SCALE_QUANTILE = 0.99


@dataclass(frozen=True)
class Activity:
    """How active every feature is at the chosen tokens."""

    scale: Float[Tensor, " d_sae"]
    """The 99th percentile of its activations where it is active; 0 where it never is."""
    count: Int[Tensor, " d_sae"]
    """Tokens on which it is active."""


@torch.no_grad()
def measure_activity(
    model: VisionLanguageModel, sae: SAE[Any], hook_name: str, questions: Sequence[Questions], tokens: Tokens
) -> Activity:
    """Measure every feature's activations at the chosen tokens of some prompts."""
    features, values = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0)]
    for batch in (batch for some in questions for batch in some.batches):
        acts = read_hook(model, batch, hook_name)
        chosen = chosen_tokens(model, batch, batch, tokens)
        for _, encoded in encode_chunks(sae, acts[chosen.to(acts.device)]):
            features.append((encoded > 0).nonzero()[:, 1].cpu())
            values.append(encoded[encoded > 0].float().cpu())
    return _activity(torch.cat(features), torch.cat(values), sae.cfg.d_sae)


def _activity(features: Tensor, values: Tensor, d_sae: int) -> Activity:
    """Take each feature's percentile: of its values in order, the one that 99% do not exceed."""
    count = torch.bincount(features, minlength=d_sae)
    by_value = values.argsort(stable=True)
    order = by_value[features[by_value].argsort(stable=True)]
    place = count.cumsum(0) - count + ((count - 1).clamp(min=0).double() * SCALE_QUANTILE).round().long()
    scale = torch.zeros(d_sae)
    live = count > 0
    scale[live] = values[order][place[live]]
    return Activity(scale=scale, count=count)


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
) -> Foreseen:
    """Attribute the logit difference of all examples to all features, active or not."""
    plain, start = inference_sae(sae), 0
    unit, ablated = torch.zeros(sae.cfg.d_sae), torch.zeros(sae.cfg.d_sae)
    directions = decoder_directions(plain, range(sae.cfg.d_sae)).detach()
    for batch in questions.batches:
        rows = slice(start, start + batch.n_rows)
        start += batch.n_rows
        metric = RowDifference(wanted[rows], unwanted[rows])
        _, acts, gradient = metric_and_gradient(model, batch, hook_name, metric)
        chosen = chosen_tokens(model, batch, batch, tokens)
        slopes = gradient[chosen.to(gradient.device)]
        effects = ValueParts.of(sae, acts, chosen).effects(sae, slopes)
        ablated.index_add_(0, effects.feature, effects.effect.float())
        stretch = output_scale(plain, acts[chosen.to(acts.device)])
        total = (slopes if stretch is None else slopes * stretch).sum(0)
        unit += (directions @ total.to(directions)).float().cpu()
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


def given_scales(sae: SAE[Any], activity: Activity, scales: Mapping[int, float] | None) -> Float[Tensor, " d_sae"]:
    """The measured scales, with given ones in their place."""
    scale = activity.scale.clone()
    for feature, value in (scales or {}).items():
        scale[feature] = value
    return scale
