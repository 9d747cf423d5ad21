"""Training from cached activations: the store that reads them in the model's place."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens.util import str_to_dtype

from sae_lens_multimodal.data.batches import PromptBatch
from sae_lens_multimodal.errors import ConfigError, SAEMismatchError
from sae_lens_multimodal.hooks.saes import same_model
from sae_lens_multimodal.training.cache_files import CachedBatch, CacheReader
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig
from sae_lens_multimodal.training.prompts import PromptSource
from sae_lens_multimodal.training.sae_config import UNSET_WIDTH
from sae_lens_multimodal.training.store import MultimodalActivationsStore
from sae_lens_multimodal.training.tokens import LabelledBatch, keep_tokens, within_norm_ratio
from sae_lens_multimodal.types import Modality

_SAME = ("context_size", "autocast_lm", "newline_tokens", "exclude_special_tokens", "too_long")
"""Settings that decided what was cached."""


@dataclass(frozen=True)
class _Place:
    """Stands for a batch of prompts: which one of the cache."""

    index: int
    n_prompts: int

    def __len__(self) -> int:
        return self.n_prompts


class CachedActivationsStore(MultimodalActivationsStore):
    """Gives the batches that the live store would give, without model and dataset.

    The first pass goes through the cache in the order in which it was written if the seed is the cache's, and so it
    gives bit for bit what training live with the settings of the cache gives. Another seed, and every further pass,
    takes the cached batches in an order of its own.
    """

    def __init__(self, cfg: MultimodalSAERunnerConfig[Any], cache: CacheReader) -> None:
        """Prepare to read; `cfg` is what `fitted_to_cache` gives."""
        self.cache = cache
        nothing = PromptSource.split([], held_out=0, seed=cfg.seed)
        super().__init__(None, cfg, nothing)  # type: ignore[arg-type]
        self.source = replace(nothing, n_held_out=cache.settings["n_held_out"])

    @classmethod
    def open(cls, cfg: MultimodalSAERunnerConfig[Any]) -> CachedActivationsStore:
        """Open the cache that the settings name.

        Raises:
            StoreError: there is none, or it is not whole.
            ConfigError: it holds other activations than the settings ask for.
            SAEMismatchError: the SAE has another width.
        """
        cache = CacheReader(str(cfg.cached_activations_path))
        return cls(fitted_to_cache(cfg, cache), cache)

    @property
    def n_rows(self) -> int | None:
        """How many rows there were to read activations from."""
        rows: int | None = self.cache.settings["n_rows"]
        return rows

    def _order(self) -> list[int]:
        count = self.cache.n_batches()
        if self.epoch == 0 and self.cfg.seed == self.cache.settings["runner"]["seed"]:
            return list(range(count))
        generator = torch.Generator().manual_seed(self.cfg.seed + self.epoch + 1)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order

    def _iterate_prompt_batches(self) -> Generator[Any]:
        while True:
            order = self._order()
            whole = self._next_row == 0
            for index in order[self._next_row :]:
                place = _Place(index, self.cache.n_prompts(index))
                self.n_dataset_processed += place.n_prompts
                self._next_row += 1
                yield place
            self._end_epoch(self._report, whole=whole)

    def read_tokens(self, prompts: Any, *, outliers: Counter[str] | None = None) -> LabelledBatch:  # noqa: ANN401
        """One cached batch, of which the tokens are kept that the settings choose."""
        return self._chosen(self.cache.read(prompts.index), outliers)

    def _chosen(self, cached: CachedBatch, outliers: Counter[str] | None = None) -> LabelledBatch:
        batch = LabelledBatch(cached.activations, cached.labels.modality)
        if self.choice.image_tokens != self.cache.settings["runner"]["image_tokens"]:
            text = cached.labels.modality == Modality.TEXT
            of_base = cached.labels.tile == 0
            batch = keep_tokens(batch, text | (of_base if self.choice.image_tokens == "base" else ~of_base))
        if self.choice.max_norm_ratio is not None:
            batch = keep_tokens(batch, within_norm_ratio(batch, self.choice.max_norm_ratio), outliers)
        return batch

    def held_out_tokens(self) -> Iterator[LabelledBatch]:
        """The tokens to evaluate on: those of the rows that were held out when the cache was made."""
        return (self._chosen(cached) for cached in self.cache.held_out())

    def held_out_batches(self) -> Iterator[PromptBatch]:
        """Refuse: prompts are not cached.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("Cached activations hold no prompts; measure losses with sae-lens-multimodal evaluate.")


def fitted_to_cache(cfg: MultimodalSAERunnerConfig[Any], cache: CacheReader) -> MultimodalSAERunnerConfig[Any]:
    """A copy of the settings with the cache's model, hook and width.

    Raises:
        ConfigError: the cache holds other activations than the settings ask for.
        SAEMismatchError: the SAE has another width.
    """
    made = cache.settings["runner"]
    for name in _SAME:
        if made[name] != getattr(cfg, name):
            raise _other(cache, name, made[name], getattr(cfg, name))
    if cfg.model_name and not same_model(cfg.model_name, made["model_name"]):
        raise _other(cache, "model_name", made["model_name"], cfg.model_name)
    if cfg.hook_name and cfg.hook_name not in (made["hook_name"], cache.settings["hook_given"]):
        raise _other(cache, "hook_name", made["hook_name"], cfg.hook_name)
    if made["image_tokens"] not in ("all", cfg.image_tokens):
        raise _other(cache, "image_tokens", made["image_tokens"], cfg.image_tokens)
    if made["image_tokens"] != cfg.image_tokens and cache.settings["is_of_patches"]:
        raise _other(cache, "image_tokens", made["image_tokens"], cfg.image_tokens)
    width = cache.settings["d_in"]
    if cfg.sae.d_in not in (UNSET_WIDTH, width):
        raise SAEMismatchError(f"sae.d_in is {cfg.sae.d_in}, but {cache.folder} holds activations {width} wide.")
    str_to_dtype(cfg.dtype)
    fitted = copy.copy(cfg)
    fitted.sae = replace(cfg.sae, d_in=width, metadata=copy.deepcopy(cfg.sae.metadata))
    fitted.hook_name, fitted.model_name = made["hook_name"], cfg.model_name or made["model_name"]
    fitted.dataset_path = cfg.dataset_path or cache.settings["dataset"]
    return fitted


def _other(cache: CacheReader, name: str, has: object, wanted: object) -> ConfigError:
    return ConfigError(
        f"{cache.folder} was cached with {name}={has!r}, the settings say {wanted!r}; change them, or cache again."
    )
