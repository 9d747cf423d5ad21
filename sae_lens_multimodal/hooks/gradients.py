"""A metric's gradient at a hook, in one forward and one backward pass, and its value where the hook is replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.metrics import Metric, shortened
from sae_lens_multimodal.hooks.read import read_activations


def check_language_hook(model: VisionLanguageModel, hook_name: str) -> None:
    """Check that a hook has one value for each token.

    Raises:
        SelectionError: it lies in the vision tower or the projector.
    """
    if model.hooks.resolve(hook_name).tower != "language":
        raise SelectionError(
            f"{hook_name} sees pictures, not tokens; attribution needs a hook of the language model, such as "
            "blocks.0.hook_resid_post."
        )


def metric_and_gradient(
    model: VisionLanguageModel,
    batch: EncodedBatch,
    hook_name: str,
    metric: Metric,
    replacement: Float[Tensor, "batch seq d_in"] | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch seq d_in"], Float[Tensor, "batch seq d_in"]]:
    """Run the model once forward and once backward.

    The hook's value is cut off from what came before, so that the backward pass goes no deeper than it, and kept in
    float32 whatever the model's type. No parameter's gradient is touched.

    Args:
        model: The model.
        batch: The prompts.
        hook_name: Where the gradient is taken.
        metric: Of what.
        replacement: The value to give the hook instead of its own.

    Returns:
        The metric of each row, the hook's value, and the metric's gradient there; heads are one dimension.
    """
    inputs = shortened(model, batch, metric.n_last(model))
    with torch.enable_grad(), frozen(model._module):
        with model.trace(**inputs):
            value = model.hooks[hook_name]
            leaf = (flat_heads(value.detach()).float() if replacement is None else replacement).clone().requires_grad_()
            model.hooks[hook_name] = leaf.to(value.dtype).reshape(value.shape)
            logits = model.output.logits.save()
            point = leaf.save()  # type: ignore[attr-defined]
        values = metric.values(model, logits, batch)
        gradient = torch.autograd.grad(values.sum(), point, allow_unused=True)[0] if values.requires_grad else None
    if gradient is None:
        raise ConfigError(f"{metric.name} does not depend on {hook_name}; expected a function of the logits.")
    _check_finite(metric, values)
    return values.detach(), point.detach(), gradient


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient, so that nothing is kept in memory for one."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@torch.no_grad()
def metric_at(
    model: VisionLanguageModel,
    batch: EncodedBatch,
    hook_name: str,
    metric: Metric,
    replacement: Float[Tensor, "batch seq d_in"],
) -> Float[Tensor, " batch"]:
    """The metric of each row where the hook has another value."""
    with model.trace(**shortened(model, batch, metric.n_last(model))):
        value = model.hooks[hook_name]
        model.hooks[hook_name] = replacement.to(value.dtype).reshape(value.shape)
        logits = model.output.logits.save()
    return metric.values(model, logits, batch)


def mean_gradient(
    model: VisionLanguageModel,
    batch: EncodedBatch,
    hook_name: str,
    metric: Metric,
    *,
    start: Float[Tensor, "batch seq d_in"],
    end: Float[Tensor, "batch seq d_in"],
    n_steps: int,
) -> Float[Tensor, "batch seq d_in"]:
    """The gradient's mean on the straight line between two values of the hook, by the midpoint rule.

    Sundararajan, Taly and Yan (2017), "Axiomatic Attribution for Deep Networks".
    """
    total = torch.zeros_like(start)
    for step in range(n_steps):
        point = start + (step + 0.5) / n_steps * (end - start)
        total += metric_and_gradient(model, batch, hook_name, metric, point)[2]
    return total / n_steps


def repeat_batch(model: VisionLanguageModel, batch: EncodedBatch, copies: int) -> EncodedBatch:
    """The same prompts several times, one whole batch after the other."""
    keys = model.family.media_keys
    media: Mapping[str, Tensor] = {key: batch[key] for key in keys if key in batch}
    inputs = {
        name: tensor.repeat(copies, *[1] * (tensor.dim() - 1)) for name, tensor in batch.items() if name not in keys
    }
    inputs.update(model.family.merge_media([media] * copies))
    layout = batch.layout
    repeated = type(layout)(
        modality=layout.modality.repeat(copies, 1),
        boxes=layout.boxes.repeat(copies, 1, 1),
        image_index=layout.image_index.repeat(copies, 1),
        tile=layout.tile.repeat(copies, 1),
        image_sizes=layout.image_sizes * copies,
        inexact=layout.inexact * copies,
    )
    return EncodedBatch(inputs=inputs, layout=repeated, images=batch.images * copies)


@torch.no_grad()
def read_hook(model: VisionLanguageModel, batch: EncodedBatch, hook_name: str) -> Float[Tensor, "batch seq d_in"]:
    """The hook's value in float32, heads as one dimension."""
    return flat_heads(read_activations(model, batch, hook_name)[hook_name]).float()


def flat_heads(value: Tensor) -> Tensor:
    """Heads as one dimension."""
    return value.flatten(2) if value.dim() > 3 else value


def _check_finite(metric: Metric, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).nonzero()[0, 0])
        raise ConfigError(f"{metric.name} is {float(values[row].detach())} in row {row}; expected a finite number.")
