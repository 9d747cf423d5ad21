"""Activations of several hooks from one forward pass, each token's side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.util import str_to_dtype

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.batches import PromptBatch
from sae_lens_multimodal.errors import DatasetError, SAEMismatchError, StoreError
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig
from sae_lens_multimodal.training.pools import Pool
from sae_lens_multimodal.training.prompts import PromptSource
from sae_lens_multimodal.training.store import PATIENCE_PROMPTS, MultimodalActivationsStore
from sae_lens_multimodal.training.tokens import LabelledBatch, keep_tokens, read_hooks, within_norm_ratio
from sae_lens_multimodal.training.tree_file import load_tree
from sae_lens_multimodal.types import Modality


class SeveralHooksStore(MultimodalActivationsStore):
    """A store whose batches hold the activations of several hooks in neighbouring columns; see `columns`.

    Hooks of the language model share their tokens, and hooks of the vision tower and the projector share the patches:
    each batch is the one that a store of one hook would give, whatever the other hooks of its kind are. Where there are
    both, prompts are read until both buffers are full, and row `i` of the patches has nothing to do with row `i` of the
    tokens.
    """

    columns: dict[str, slice]
    """Which columns of a batch are whose."""

    def __init__(
        self,
        model: VisionLanguageModel,
        cfg: MultimodalSAERunnerConfig[Any],
        source: PromptSource,
        widths: Mapping[str, int],
    ) -> None:
        """Prepare to read.

        Args:
            model: the model.
            cfg: what all SAEs share.
            source: the prompts.
            widths: the hooks by their canonical names, and how wide each is.
        """
        super().__init__(model, cfg, source)
        of_patches = [name for name in widths if model.hooks.resolve(name).tower != "language"]
        of_tokens = [name for name in widths if name not in of_patches]
        self.hook_name = ", ".join(widths)
        self._widths = dict(widths)
        self._first_hooks = of_tokens or of_patches
        self._patch_hooks = of_patches if of_tokens else []
        self.columns = {}
        start = 0
        for name in [*self._first_hooks, *self._patch_hooks]:
            self.columns[name] = slice(start, start + widths[name])
            start += widths[name]
        self.d_in = sum(widths[name] for name in self._first_hooks)
        self._patch_generator = torch.Generator().manual_seed(cfg.seed + 1)
        self._patch_pool = Pool(
            self.n_batches_in_buffer * self.train_batch_size_tokens if self._patch_hooks else 0,
            self._patch_generator,
            self.device,
        )
        if self._patch_hooks:
            # Reading goes on until the patches' pool is full, too: what waits would only grow.
            for pool in self._pools.values():
                pool.drop_surplus()
        self._patches = LabelledBatch(torch.empty(0, 0), torch.empty(0, dtype=torch.int8))
        self._prompts_without_patches = 0

    def split(self, batch: LabelledBatch, hook_name: str) -> LabelledBatch:
        """One hook's part of a batch."""
        # Contiguous, as it would be alone: products of strided matrices may be rounded otherwise.
        activations = batch.activations[:, self.columns[hook_name]].contiguous()
        if hook_name in self._patch_hooks:
            return LabelledBatch(activations, torch.full_like(batch.modality, int(Modality.IMAGE)))
        return LabelledBatch(activations, batch.modality)

    @torch.no_grad()
    def next_labelled(self) -> LabelledBatch:
        """The next training batch of all hooks, with the modality of the language model's tokens."""
        batch = super().next_labelled()
        if not self._patch_hooks:
            return batch
        rows, _ = self._patch_pool.take(self.train_batch_size_tokens)
        return LabelledBatch(torch.cat([batch.activations, rows.to(str_to_dtype(self.cfg.dtype))], 1), batch.modality)

    def read_tokens(self, prompts: PromptBatch, *, outliers: Counter[str] | None = None) -> LabelledBatch:
        """Run the model up to the deepest hook; the patches of the vision tower wait to be put into their pool."""
        every = read_hooks(self.model, prompts.batch, list(self._widths), self.choice, autocast=self.autocast_lm)
        for name, read in every.items():
            if len(read.activations) and read.activations.shape[1] != self._widths[name]:
                raise SAEMismatchError(
                    f"{name} of {self.model.name} gives {read.activations.shape[1]} values a token, but its SAE's d_in "
                    f"is {self._widths[name]}; set d_in to {read.activations.shape[1]}."
                )
        if self._patch_hooks:
            self._patches = self._packed(every, self._patch_hooks, None)
        return self._packed(every, self._first_hooks, outliers)

    def _packed(
        self, every: Mapping[str, LabelledBatch], names: list[str], outliers: Counter[str] | None
    ) -> LabelledBatch:
        parts = [every[name] for name in names]
        ratio = self.choice.max_norm_ratio
        packed = LabelledBatch(torch.cat([part.activations.to(self.device) for part in parts], 1), parts[0].modality)
        if ratio is None:
            return packed
        kept = torch.stack([within_norm_ratio(part, ratio) for part in parts]).all(0)
        return keep_tokens(packed, kept, outliers)

    def _read_into_pools(self, prompts: PromptBatch) -> None:
        super()._read_into_pools(prompts)
        if not self._patch_hooks:
            return
        self._patch_pool.add(*self._patches)
        self._prompts_without_patches += len(prompts)
        if len(self._patches.modality):
            self._prompts_without_patches = 0
        if self._prompts_without_patches >= PATIENCE_PROMPTS:
            raise DatasetError(
                f"{', '.join(self._patch_hooks)} read pictures, but the last {self._prompts_without_patches} prompts "
                "hold none; give a dataset with pictures."
            )

    def _refill(self) -> None:
        self._patch_pool.begin_refill()
        super()._refill()
        while not self._patch_pool.is_full:
            self._read_into_pools(next(self._prompt_batches))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the batches to come depend on, the patches' buffer too."""
        own = {"generator": self._patch_generator.get_state(), "pool": self._patch_pool.snapshot()}
        return {**super().state_dict(), "patches": own}

    def load(self, file_path: str) -> None:
        """Go on where a saved state was.

        Raises:
            StoreError: the file is another store's.
        """
        super().load(file_path)
        state = load_tree(Path(file_path)).get("patches")
        if state is None:
            raise StoreError(f"{file_path} is of a run of one SAE; give a checkpoint of a run of several.")
        self._patch_generator.set_state(state["generator"])
        self._restore_pool("image", self._patch_pool, state["pool"])
