"""Running a model again and again from one block and one position on: what lies before them is computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks.metrics import last_positions

Rewrite = Callable[[Tensor, Tensor], Tensor]
"""From a linear layer's input and output to what is to be its output."""


class Tail:
    """The later blocks of a model on the later tokens of a batch, with everything before them kept.

    The blocks are called as the model itself called them once; of the tokens before the first change only keys and
    values are kept, so that a step costs next to nothing for pictures. Where that does not give the model's own logits
    (a family that does more between its blocks, or whose cache is of another kind), all tokens or the whole model are
    run each time instead.
    """

    def __init__(
        self, model: VisionLanguageModel, batch: EncodedBatch, layer: int, n_targets: int, *, first_change: int = 0
    ) -> None:
        """Run the model once or twice.

        Args:
            model: the model as it was loaded; copies that nnsight edited run like it.
            batch: the prompts, with all but the last of the target's tokens.
            layer: the first block to run again.
            n_targets: tokens of the target; logits are those of as many positions at the end of each row.
            first_change: the first column of the batch in which anything will be changed.
        """
        self._module: Any = model._module
        paths = [model.hooks.resolve(f"blocks.{one}.hook_resid_post").module_path for one in range(model.n_layers)]
        self._blocks: list[Any] = [self._module.get_submodule(path) for path in paths[layer:]]
        self._ends = [self._module.get_submodule(path) for path in (model.family.final_norm, model.family.unembedding)]
        self._places = last_positions(batch).cpu()[:, None] + torch.arange(1 - n_targets, 1)
        self._inputs = _with_positions(model, batch)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._past: Any = None
        self.offset = 0
        """Columns of the batch that are not run again."""
        self.n_blocks = model.n_layers
        """Blocks that are run again."""
        with torch.no_grad():
            self.first = self._at_targets(self._kept_calls(self._inputs))
            if self._agrees():
                self.n_blocks = len(self._blocks)
                self._cut(model, batch, first_change)
            else:
                self._calls = []

    def logits(self) -> Float[Tensor, "batch targets vocabulary"]:
        """The logits of the target's tokens, in float32; with gradients if they are on."""
        if self._calls:
            return self._rerun()
        return self._at_targets(self._module(**self._inputs, use_cache=False).logits)

    def _kept_calls(self, inputs: Mapping[str, Any], **more: Any) -> Tensor:  # noqa: ANN401 - the model's own
        """Run the model, keep how its blocks were called, and return its logits."""
        self._calls = []

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append((args, kwargs))

        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in self._blocks]
        try:
            logits: Tensor = self._module(**{"use_cache": False, **inputs, **more}).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits

    def _agrees(self) -> bool:
        """Whether the blocks alone give the model's logits, twice."""
        if len(self._calls) != len(self._blocks) or not all(a and isinstance(a[0], Tensor) for a, _ in self._calls):
            return False
        again = (self._rerun(), self._rerun())
        return all(
            one.shape == self.first.shape and torch.allclose(one, self.first, rtol=1e-2, atol=_TOLERANCE)
            for one in again
        )

    def _cut(self, model: VisionLanguageModel, batch: EncodedBatch, column: int) -> None:
        """Leave out the tokens before a column, if pictures end before it and the model gives the same without them."""
        pictures = (batch["input_ids"] == model.family.image_token_id).any(0).nonzero()
        if column <= (int(pictures.max()) if len(pictures) else 0) or not bool((self._places >= column).all()):
            return
        whole = self._calls, self._places
        shape, media = batch["input_ids"].shape, set(model.family.media_keys)
        by_token = {name for name, one in self._inputs.items() if name not in media and one.shape[:2] == shape}
        before = {name: one[:, :column] if name in by_token else one for name, one in self._inputs.items()}
        after = {name: one[:, column:] for name, one in self._inputs.items() if name in by_token}
        after["attention_mask"] = self._inputs["attention_mask"]
        self._past = getattr(self._module(**before, use_cache=True), "past_key_values", None)
        if isinstance(self._past, Cache):
            self._places = self._places - column
            self._kept_calls(after, past_key_values=_copied(self._past), use_cache=True)
            if self._agrees():
                self.offset = column
                return
        self._past = None
        self._calls, self._places = whole

    def _rerun(self) -> Tensor:
        past = None if self._past is None else _copied(self._past)
        hidden: Any = self._calls[0][0][0]
        for block, (args, kwargs) in zip(self._blocks, self._calls, strict=True):
            given = {name: past if isinstance(one, Cache) else one for name, one in kwargs.items()}
            hidden = block(hidden, *args[1:], **given)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        norm, unembedding = self._ends
        return unembedding(norm(self._at_targets(hidden, cast=False))).float()

    def _at_targets(self, values: Tensor, *, cast: bool = True) -> Tensor:
        rows = torch.arange(len(values), device=values.device)[:, None]
        found = values[rows, self._places.to(values.device)]
        return found.float() if cast else found


_TOLERANCE = 0.05
"""Logits of the same run in another order of operations differ by less, in half precision too."""


def _with_positions(model: VisionLanguageModel, batch: EncodedBatch) -> dict[str, Tensor]:
    inputs = dict(batch)
    positions = None if "position_ids" in inputs else model.family.positions(inputs)
    return inputs if positions is None else {**inputs, "position_ids": positions}


def _copied(past: Any) -> Any:  # noqa: ANN401 - transformers' caches
    """Copy a cache's layers but not their tensors: an update puts new tensors in their places."""
    found = copy.copy(past)
    found.layers = [copy.copy(layer) for layer in past.layers]
    return found


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


def added_at(places: Int[Tensor, "batch places"], change: Float[Tensor, "places d_out"]) -> Rewrite:
    """Add to each row a change at each of its places."""

    def rewrite(_inputs: Tensor, output: Tensor) -> Tensor:
        share = torch.zeros(*output.shape[:2], len(change), device=output.device)
        rows, number = torch.arange(len(places))[:, None], torch.arange(len(change))
        share[rows, places.to(output.device), number] = 1.0
        return output + (share @ change.to(output.device)).to(output.dtype)

    return rewrite


def added_as_read(right: Float[Tensor, "places d_in"], change: Float[Tensor, "places d_out"]) -> Rewrite:
    """Add to every token what rank-one updates `change_i right_iᵀ` add there."""

    def rewrite(inputs: Tensor, output: Tensor) -> Tensor:
        share = inputs.float() @ right.to(inputs.device).T
        return output + (share @ change.to(output.device)).to(output.dtype)

    return rewrite
