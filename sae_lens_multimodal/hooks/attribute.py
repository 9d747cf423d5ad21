"""Attribution: what every active SAE feature contributes to a metric, from one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.attribution_result import Attribution, Completeness
from sae_lens_multimodal.hooks.gradients import check_language_hook, mean_gradient, metric_and_gradient, metric_at
from sae_lens_multimodal.hooks.metrics import Metric, MetricFunction, as_metric
from sae_lens_multimodal.hooks.saes import check_sae
from sae_lens_multimodal.hooks.selection import ForwardPass, Tokens, TokenSelection
from sae_lens_multimodal.hooks.value_parts import PartEffects, ValueParts
from sae_lens_multimodal.types import Conversation

Method: TypeAlias = Literal["gradient", "grouped_gradients", "integrated_gradients"]
"""The gradient where the model is; gradients with a few nodes half ablated; the mean on the way to the baseline."""

GROUP_NODES = 64
"""Nodes of each row in a group of grouped gradients."""

Baseline: TypeAlias = Literal["ablated", "zero"]
"""What the chosen tokens are compared with: all features ablated (error and bias stay), or a hook's value of zero."""

Prompts: TypeAlias = "EncodedBatch | Conversation | Sequence[Conversation]"
"""What `model.encode` returns, or takes."""


def attribute(
    model: VisionLanguageModel,
    sae: SAE[Any],
    prompts: Prompts,
    metric: Metric | MetricFunction,
    *,
    hook_name: str | None = None,
    tokens: Tokens = "all",
    method: Method = "gradient",
    n_steps: int = 6,
    baseline: Baseline = "ablated",
    completeness: bool = True,
) -> Attribution:
    """Estimate what ablating each active feature at each token would change in a metric.

    With x the hook's value at a token, z its feature activations and g the metric's gradient, the effect of feature i
    is -z_i (W_dec[i] · g). What the SAE does not reconstruct, e = x - x̂, is a node of its own with -(e · g), and so is
    the part of x̂ that no feature makes; together they add up to -(x · g). One forward and one backward pass
    give all of them, for all rows of the batch.

    Args:
        model: The model, or a steered one.
        sae: An SAE on a hook of the language model.
        prompts: Encoded prompts, or conversations, whose answers are then begun.
        metric: `LogitDifference`, `ContinuationLogProbability`, or a function of logits and batch that gives one
            number a row.
        hook_name: The hook; None for the one the SAE was trained on.
        tokens: The tokens whose features are asked about; as in `steer`. What the metric appends to the prompts is
            counted among `"all"` and `"text"`.
        method: `"gradient"`; or `"grouped_gradients"`, which deals the nodes that it puts first out to `n_steps` groups
            and takes each one's gradient where its group is half ablated, so that a curve towards the ablation is
            followed to second order; or `"integrated_gradients"`, the gradient's mean over `n_steps` points on the way
            to the baseline, on which effects add up best. Both cost `n_steps` passes more.
        n_steps: Groups, or points.
        baseline: What completeness is measured against, and where integrated gradients lead.
        completeness: Also run the model on the baseline, to tell how far the effects are from adding up.

    Raises:
        SAEMismatchError: the SAE does not fit the hook.
        UnknownHookError: the model has no such hook.
        SelectionError: the tokens select nothing, or the hook has no tokens.
        ConfigError: method, steps, baseline or metric are none of the known, or the metric is not a finite number.
        PromptError, ImageError, LayoutError: as `model.encode`.
    """
    name = check_sae(model, sae, hook_name)
    check_language_hook(model, name)
    _check_choices(method, n_steps, baseline)
    measured = as_metric(metric)
    prompt = encoded(model, prompts)
    batch = measured.prepare(model, prompt)
    chosen = chosen_tokens(model, prompt, batch, tokens)
    values, acts, gradient = metric_and_gradient(model, batch, name, measured)
    parts = ValueParts.of(sae, acts, chosen)
    end = acts.clone()
    end[chosen] = 0.0 if baseline == "zero" else acts[chosen] - parts.from_features
    if method == "integrated_gradients":
        gradient = mean_gradient(model, batch, name, measured, start=acts, end=end, n_steps=n_steps)
    found = parts.effects(sae, gradient[chosen])
    if method == "grouped_gradients":
        found = _grouped(model, sae, batch, name, measured, acts, chosen, parts, n_steps, found)
    result = Attribution(
        hook_name=name,
        metric=measured,
        method=method if method == "gradient" else f"{method}, {n_steps} steps",
        baseline=baseline,
        batch=batch,
        tokens=[model.token_strings(row) for row in batch["input_ids"]],
        chosen=chosen,
        values=values.cpu(),
        completeness=None,
        **_placed(found, chosen),
    )
    if not completeness:
        return result
    changed = metric_at(model, batch, name, measured, end) - values
    return _with_completeness(result, changed.cpu())


def _grouped(
    model: VisionLanguageModel,
    sae: SAE[Any],
    batch: EncodedBatch,
    hook_name: str,
    metric: Metric,
    acts: Float[Tensor, "batch seq d_in"],
    chosen: Bool[Tensor, "batch seq"],
    parts: ValueParts,
    n_groups: int,
    plain: PartEffects,
) -> PartEffects:
    """Take the effects of the largest nodes from gradients where each and its group are half ablated.

    Half way of its ablation a node's slope is that of the chord, to second order; what the rest of its group changes
    is noise. So groups are small: only the nodes that the plain gradient puts first, `GROUP_NODES` of each row to a
    group, dealt out in turn.
    """
    place = _ranks(chosen.nonzero()[:, 0][plain.token], plain.effect.abs())
    group = torch.where(place < n_groups * GROUP_NODES, place % n_groups, -1)
    effect = plain.effect.clone()
    for number in range(n_groups):
        mine = group == number
        if not bool(mine.any()):
            continue
        point = acts.clone()
        point[chosen] -= 0.5 * parts.added_by(sae, mine.to(acts.device))
        gradient = metric_and_gradient(model, batch, hook_name, metric, point)[2]
        effect[mine] = parts.effects(sae, gradient[chosen]).effect[mine]
    return replace(plain, effect=effect)


def _ranks(row: Int[Tensor, " nodes"], size: Float[Tensor, " nodes"]) -> Int[Tensor, " nodes"]:
    """Number the nodes of each row by size, the largest 0."""
    place = torch.zeros_like(row)
    for one in row.unique():
        mine = (row == one).nonzero()[:, 0]
        order = size[mine].argsort(descending=True, stable=True)
        place[mine[order]] = torch.arange(len(mine))
    return place


def _check_choices(method: str, n_steps: int, baseline: str) -> None:
    for name, got, known in (("method", method, get_args(Method)), ("baseline", baseline, get_args(Baseline))):
        if got not in known:
            raise ConfigError(f"Got {name}={got!r}; expected one of {', '.join(known)}.")
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise ConfigError(f"Got n_steps={n_steps!r}; expected 1 or more.")


def encoded(model: VisionLanguageModel, prompts: Prompts) -> EncodedBatch:
    """Encode conversations, each with the opening of its answer; leave a batch as it is. On the model's device."""
    batch = prompts if isinstance(prompts, EncodedBatch) else model.encode(prompts, add_generation_prompt=True)
    return batch.to(next(model._module.parameters()).device)


def chosen_tokens(
    model: VisionLanguageModel, prompt: EncodedBatch, batch: EncodedBatch, tokens: Tokens
) -> Bool[Tensor, "batch seq"]:
    """The tokens meant, on the CPU and without padding.

    Names and functions are about all that the model reads; masks and positions are about the prompt.

    Raises:
        SelectionError: there are none.
    """
    whole = isinstance(tokens, str) or callable(tokens)
    about = batch if whole else prompt
    sizes = [size for row in about.layout.image_sizes for size in row]
    forward = ForwardPass(dict(about), 0, sizes, n_prompts=about.n_rows)
    mask = TokenSelection.check(tokens, "prefill", model.family).mask(forward)
    found = torch.zeros(batch.layout.modality.shape, dtype=torch.bool)
    if mask is not None:
        found[:, : mask.shape[1]] = mask.cpu()
    found &= batch["attention_mask"].cpu() != 0
    if not bool(found.any()):
        raise SelectionError(f"Got tokens={tokens!r}, which select nothing in these prompts; expected at least one.")
    return found


def _placed(found: PartEffects, chosen: Tensor) -> dict[str, Tensor]:
    """Bring effects of the chosen tokens to their rows and positions."""
    places = chosen.nonzero()
    dense = {}
    for name, values in (("error_effect", found.error), ("bias_effect", found.bias)):
        dense[name] = torch.zeros(chosen.shape, dtype=values.dtype)
        dense[name][chosen] = values
    row, token = places[found.token].unbind(-1)
    return {
        "row": row,
        "token": token,
        "feature": found.feature,
        "activation": found.activation,
        "effect": found.effect,
        **dense,
    }


def _with_completeness(result: Attribution, changed: Tensor) -> Attribution:
    part: Any = "all" if result.baseline == "zero" else "features"
    linear = result.by_token(part=part).sum(-1)
    found = [
        Completeness(linear_change=float(one), true_change=float(other))
        for one, other in zip(linear, changed, strict=True)
    ]
    return replace(result, completeness=found)
