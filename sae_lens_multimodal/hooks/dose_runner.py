"""One prompt, steered in many ways at once: what comes before the steered hook is run once for all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import UnsupportedModelError
from sae_lens_multimodal.hooks.gradients import repeat_batch
from sae_lens_multimodal.hooks.metrics import append_tokens, shortened
from sae_lens_multimodal.hooks.selection import ForwardPass, TokenSelection
from sae_lens_multimodal.hooks.steer import steer, steering_part
from sae_lens_multimodal.hooks.steering import Source
from sae_lens_multimodal.hooks.trace_run import BlockRunner, KeptKeys, Recording, value_of
from sae_lens_multimodal.types import Conversation

logger = logging.getLogger(__name__)

_WORTH_KEEPING = 0.25
"""Share of the prompt before the first steered token from which it pays to keep its keys and values."""


_MAX_ROUNDING = 0.05
"""Of the largest logit: how far another order of sums may lead in half precision."""


class DoseRunner:
    """Runs a prompt as a batch whose rows are steered differently, the first not at all."""

    def __init__(
        self, model: VisionLanguageModel, sae: Source, rows: Sequence[Any], settings: Mapping[str, Any]
    ) -> None:
        """Check everything that can be checked before anything runs.

        Args:
            model: the model.
            sae: the SAE or vector.
            rows: the changes of each row, as `steer` takes them; those of the first change nothing.
            settings: `tokens`, `steps`, `hook_name` and `error` of `steer`.
        """
        self.model, self.sae, self.rows, self.settings = model, sae, rows, settings
        self.selection = TokenSelection.check(settings["tokens"], settings["steps"], model.family)
        steer(model, sae, rows, **settings)
        self.part = steering_part(model, sae, rows, settings["hook_name"], settings["error"])

    def logits(
        self, prompt: Conversation, ids: Sequence[int], bar: tqdm[Any]
    ) -> Float[Tensor, "rows predicted vocabulary"]:
        """Return the logits that predict each token of the answer (one, if there is no answer), by row."""
        batch = self.model.encode([prompt], add_generation_prompt=True)
        whole = append_tokens(self.model, batch, ids[:-1]) if len(ids) > 1 else batch
        mask = self._mask(whole, batch.layout.n_tokens)
        n_predicted = max(len(ids), 1)
        found = None if mask is None else self._from_the_hook(whole, mask, n_predicted)
        if found is None:
            found = self._whole(whole, mask, n_predicted)
        bar.update(1)
        return found.float().cpu().expand(len(self.rows), -1, -1)

    def _mask(self, whole: EncodedBatch, length: int) -> Bool[Tensor, "1 seq"] | None:
        """The positions that would be steered if the answer were generated; None where there are none."""
        layout = whole.layout
        sizes = [size for row in layout.image_sizes for size in row]
        step = layout.n_tokens - length
        mask = self.selection.mask(ForwardPass(dict(whole), step, sizes, n_prompts=whole.n_rows, prompt_tokens=length))
        return mask.cpu() if mask is not None and bool(mask.any()) else None

    def _whole(self, whole: EncodedBatch, mask: Tensor | None, n_predicted: int) -> Tensor:
        """Run the whole model on as many copies of the prompt as there are rows."""
        steered, batch = self.model, whole
        if mask is not None:
            settings = {**self.settings, "tokens": mask[0], "steps": "prefill"}
            steered = steer(self.model, self.sae, self.rows, **settings)
            batch = repeat_batch(self.model, whole, len(self.rows))
        logits: Tensor = steered.trace(**shortened(self.model, batch, n_predicted), trace=False).logits
        return logits[:, -n_predicted:]

    def _from_the_hook(self, whole: EncodedBatch, mask: Tensor, n_predicted: int) -> Tensor | None:
        """Run the model once, and from the hook on for all rows; None where it cannot be taken apart like that."""
        hook = self.part.hook
        if self.model._edits or hook.layer is None or hook.operation is not None:
            return None
        first = min(int(mask[0].nonzero()[0, 0]), mask.shape[1] - n_predicted)
        try:
            runner = BlockRunner(self.model, keep_logits=n_predicted)
            recording = runner.record(whole.to(self.model.device), [hook.name])
            keys = runner.keys_of(recording) if first > _WORTH_KEEPING * mask.shape[1] else None
        except UnsupportedModelError as error:
            logger.info("%s is run whole for every strength: %s", self.model.name, error)
            return None
        found = self._go_on(runner, recording, keys, mask, first if keys is not None else 0)
        expected = recording.logits.to(found)
        allowed = min(200 * torch.finfo(self.model.dtype).eps, _MAX_ROUNDING) * float(expected.abs().max())
        if torch.allclose(found[0], expected, rtol=0, atol=allowed):
            return found
        logger.info("%s is run whole for every strength: its blocks by themselves give other logits", self.model.name)
        return None

    def _go_on(
        self, runner: BlockRunner, recording: Recording, keys: KeptKeys | None, mask: Tensor, first: int
    ) -> Tensor:
        hook, rows = self.part.hook, len(self.rows)
        assert hook.layer is not None
        chosen = mask[:, first:].expand(rows, -1)
        if hook == runner.points[hook.layer]:
            value = value_of(recording.values[hook.name], hook)[:, first:]
            hidden = self.part.steered(value.expand(rows, -1, -1), chosen)
            extra = recording.added[hook.layer]
            hidden = hidden if extra is None else hidden + extra[:, first:]
            return runner.go_on(recording, hook.layer + 1, hidden, keys=keys)
        hidden = recording.calls[hook.layer].hidden[:, first:].expand(rows, -1, -1)
        changes = {hook.name: lambda one: self.part.steered(one, chosen)}
        return runner.go_on(recording, hook.layer, hidden, keys=keys, changes=changes)
