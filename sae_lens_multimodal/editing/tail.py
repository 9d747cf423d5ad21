"""Running a model again and again from one block on: what lies before it is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks.metrics import last_positions

Rewrite = Callable[[Tensor, Tensor], Tensor]
"""From a linear layer's input and output to what is to be its output."""


class Tail:
    """The blocks of a model from one on, on a batch whose way there is kept.

    The blocks are called as the model itself called them once. Where that does not give the model's own logits (a
    family that does more between its blocks, or after them), the whole model is run each time instead.
    """

    def __init__(self, model: VisionLanguageModel, batch: EncodedBatch, layer: int, n_targets: int) -> None:
        """Run the model once.

        Args:
            model: the model.
            batch: the prompts, with all but the last of the target's tokens.
            layer: the first block to run again.
            n_targets: tokens of the target; logits are those of as many positions at the end of each row.
        """
        self._model, self._batch = model, batch
        paths = [model.hooks.resolve(f"blocks.{one}.hook_resid_post").module_path for one in range(model.n_layers)]
        self._blocks: list[Any] = [model._module.get_submodule(path) for path in paths[layer:]]
        self._ends = [model._module.get_submodule(path) for path in (model.family.final_norm, model.family.unembedding)]
        last = last_positions(batch).cpu()
        self._places = last[:, None] + torch.arange(1 - n_targets, 1)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        with torch.no_grad():
            handles = [block.register_forward_pre_hook(self._keep, with_kwargs=True) for block in self._blocks]
            try:
                self.first = self._whole()
            finally:
                for handle in handles:
                    handle.remove()
            self._short = len(self._calls) == len(self._blocks) and self._agrees()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        self._calls.append((args, kwargs))

    def _agrees(self) -> bool:
        if not all(args and isinstance(args[0], Tensor) for args, _ in self._calls):
            return False
        again = self._rerun()
        return again.shape == self.first.shape and torch.allclose(again, self.first, rtol=1e-3, atol=1e-3)

    @property
    def is_short(self) -> bool:
        """Whether only the blocks are run again, not the whole model."""
        return self._short

    def logits(self) -> Float[Tensor, "batch targets vocabulary"]:
        """The logits of the target's tokens, in float32; with gradients if they are on."""
        return self._rerun() if self._short else self._whole()

    def _rerun(self) -> Tensor:
        hidden: Any = self._calls[0][0][0]
        for block, (args, kwargs) in zip(self._blocks, self._calls, strict=True):
            hidden = block(hidden, *args[1:], **kwargs)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        norm, unembedding = self._ends
        return unembedding(norm(self._at_targets(hidden))).float()

    def _whole(self) -> Tensor:
        with self._model.trace(**self._batch, use_cache=False):
            logits = self._model.output.logits.save()
        return self._at_targets(logits).float()

    def _at_targets(self, values: Tensor) -> Tensor:
        rows = torch.arange(len(values), device=values.device)[:, None]
        return values[rows, self._places.to(values.device)]


@contextmanager
def rewritten(module: nn.Linear, rewrite: Rewrite) -> Iterator[None]:
    """Rewrite a linear layer's output for a while."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return rewrite(inputs[0], output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def added_at(positions: Int[Tensor, " batch"], change: Float[Tensor, " d_out"]) -> Rewrite:
    """Add a change to one position of each row."""

    def rewrite(_inputs: Tensor, output: Tensor) -> Tensor:
        places = torch.zeros(output.shape[:2], device=output.device)
        places[torch.arange(len(positions)), positions] = 1.0
        return output + (places[..., None] * change.to(output.device)).to(output.dtype)

    return rewrite
