"""Reading hooks of a batch in one forward pass that goes no deeper than it must."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import SelectionError


def read_activations(
    model: VisionLanguageModel,
    batch: Mapping[str, Tensor],
    hook_names: str | Sequence[str],
    *,
    stop: bool = True,
) -> dict[str, Float[Tensor, "..."]]:
    """Read the values of hooks for a batch, without gradients.

    Args:
        model: The model, or a steered one: then the values are those after steering.
        batch: What `model.encode` returns, or any of the model's inputs.
        hook_names: One hook or several, in any order; of the language model, the vision tower or the projector.
        stop: End the forward pass right after the deepest hook. Neither deeper blocks nor logits are computed then.

    Returns:
        For each name as it was given, its value: [batch, seq, width] for hooks of the language model's residual stream,
        with heads as TransformerLens has them for attention, and with the pieces of pictures as the batch dimension in
        the vision tower.

    Raises:
        UnknownHookError: the model has no such hook.
        SelectionError: no hook was named, or the forward pass did not reach one, as the vision tower's without a
            picture.
    """
    names = [hook_names] if isinstance(hook_names, str) else list(dict.fromkeys(hook_names))
    if not names:
        raise SelectionError("Got no hook names; expected at least one, such as blocks.2.hook_resid_post.")
    for name in names:
        model.hooks.resolve(name)
    values: dict[str, Tensor] = {}

    def read(name: str) -> bool:
        """Keep one hook's value; say whether all are there."""
        values[name] = model.hooks[name].detach().clone()
        return len(values) == len(names)

    try:
        # One invoke for each hook: the hooks may be named in any order, whatever order the model reaches them in.
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(**batch):
                pass
            for name in names:
                with tracer.invoke():
                    if read(name) and stop:
                        tracer.stop()
    except OutOfOrderError as error:
        missing = [name for name in names if name not in values]
        if not missing:
            raise
        raise SelectionError(
            f"The forward pass did not reach {', '.join(missing)}; the vision tower and the projector run only where "
            "the batch has a picture."
        ) from error
    return {name: values[name] for name in names}
