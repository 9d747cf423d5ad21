"""Caching the activations of a training run: as much as the run would read, foretold before it starts."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.batches import EncodingSettings, PromptBatch
from sae_lens_multimodal.data.mixture import Mixture
from sae_lens_multimodal.data.skips import SkipReport
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.errors import ConfigError, StoreError
from sae_lens_multimodal.training.cache_files import HELD_OUT, LABEL_BYTES, TRAIN, CacheWriter, TokenLabels
from sae_lens_multimodal.training.checkpoint import run_id
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig
from sae_lens_multimodal.training.output import describe_dataset
from sae_lens_multimodal.training.pools import share_counts
from sae_lens_multimodal.training.prompts import PromptSource, open_source
from sae_lens_multimodal.training.runner import fitted_config, load_run_model
from sae_lens_multimodal.training.store import MultimodalActivationsStore
from sae_lens_multimodal.training.threshold import THRESHOLD_BATCHES
from sae_lens_multimodal.training.tokens import (
    GROUP_OF_MODALITY,
    LabelledBatch,
    keep_tokens,
    read_hooks,
    within_norm_ratio,
)

logger = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30
_PROBED_BATCHES = 16
_FINISHING_BATCHES = 2 * THRESHOLD_BATCHES
_SPARE = 1.05
"""So much more than is foretold must be free."""


@dataclass(frozen=True)
class CacheForecast:
    """How large a cache will be, as far as its first prompts tell."""

    n_prompts: int
    n_tokens: int
    n_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"about {self.n_tokens:,} tokens of {self.n_prompts:,} prompts, {in_units(self.n_bytes)}; "
            f"{in_units(self.free_bytes)} are free"
        )


def in_units(n_bytes: float) -> str:
    """A number of bytes for people.

    >>> in_units(1536), in_units(3.2e12)
    ('1.5 KiB', '2.9 TiB')
    """
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    for unit in units[:-1]:
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} {units[-1]}"


class _CachingStore(MultimodalActivationsStore):
    """Reads prompts exactly as training with the same settings would, and writes their activations.

    The pools hold tokens of width 0: they tell how much a run reads, and take next to no memory.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        cfg: MultimodalSAERunnerConfig[Any],
        source: PromptSource,
        take: Callable[[LabelledBatch, TokenLabels, int], None],
    ) -> None:
        super().__init__(model, cfg, source)
        self._take = take

    def read_tokens(self, prompts: PromptBatch, *, outliers: Counter[str] | None = None) -> LabelledBatch:
        every, labels = read_labelled(self, prompts)
        self._take(every, labels, len(prompts))
        kept = every
        if self.choice.max_norm_ratio is not None:
            # Cached all the same: what trains from the cache may choose another ratio.
            kept = keep_tokens(every, within_norm_ratio(every, self.choice.max_norm_ratio), outliers)
        return LabelledBatch(kept.activations[:, :0], kept.modality)

    def demand(self) -> None:
        """Read what one training batch more needs."""
        if self._batches_left == 0:
            self._refill()
        self._batches_left -= 1
        for name, count in self._counts.items():
            self._pools[name].take(count)


def read_labelled(store: MultimodalActivationsStore, prompts: PromptBatch) -> tuple[LabelledBatch, TokenLabels]:
    """The tokens of a batch of prompts that can be trained on, outliers too, with where each comes from."""
    read = read_hooks(store.model, prompts.batch, [store.hook_name], store.choice, autocast=store.autocast_lm)
    batch = read[store.hook_name]
    layout = prompts.batch.layout
    chosen = store.choice.select(layout, prompts.batch["input_ids"].cpu())
    if store.model.hooks.resolve(store.hook_name).tower != "language":
        # Patches of the vision tower are no tokens of the prompt: of them only the modality is known.
        nowhere = torch.full((len(batch.modality),), -1)
        return batch, TokenLabels(batch.modality, nowhere.int(), nowhere.int(), nowhere)
    rows = torch.tensor([prompt.row for prompt in prompts.prompts])[:, None].expand_as(chosen)
    labels = TokenLabels(
        batch.modality, layout.image_index[chosen].int(), layout.tile[chosen].int(), rows[chosen].long()
    )
    return batch, labels


def cache_activations(
    cfg: MultimodalSAERunnerConfig[Any],
    override_dataset: Rows | Mixture | None = None,
    override_model: VisionLanguageModel | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = logger.info,
) -> Path:
    """Write the activations that a training run with these settings would read, to train from many times.

    They go into `cfg.cached_activations_path`, or where SAE-Lens would look for them. A call that was killed goes on
    where its last shard ended.

    Args:
        cfg: the settings of the run.
        override_dataset: a dataset in place of `dataset_path`.
        override_model: a loaded model in place of `model_name`.
        shard_bytes: size of a shard; so much is held in memory.
        say: told how large the cache will be, before it is written.

    Returns:
        The folder.

    Raises:
        ConfigError: settings that cannot work.
        StoreError: the folder holds something else, or the disk has too little room.
    """
    folder = Path(cache_folder(cfg))
    source = open_source(cfg, override_dataset)
    model = override_model if override_model is not None else load_run_model(cfg)
    hook_given = cfg.hook_name
    cfg = fitted_config(cfg, model)
    writer = CacheWriter(folder, {"run": run_id(cfg.to_dict())}, shard_bytes=shard_bytes)
    say(_foretold(cfg, model, source, folder, writer))

    def take(batch: LabelledBatch, labels: TokenLabels, n_prompts: int) -> None:
        writer.add(batch.activations, labels, n_prompts)

    store = _CachingStore(model, cfg, source, take)
    done = 0
    if writer.state is None:
        _write_held_out(store, writer)
    else:
        store.load_state(writer.state["store"])
        store.restore_counts(writer.state["counts"])
        done = writer.state["done"]
    total = batches_of_run(cfg)
    for number in tqdm(
        range(done, total), desc="Caching", unit="batch", initial=done, total=total, disable=not cfg.progress
    ):
        store.demand()
        if writer.is_due:
            writer.flush(TRAIN, _state(store, number + 1))
    writer.flush(TRAIN, _state(store, total))
    store.finish_reading()
    writer.finish({**_about(cfg, store), "hook_given": hook_given})
    return folder


def cache_folder(cfg: MultimodalSAERunnerConfig[Any]) -> str:
    """Where the cache of a run lies.

    Raises:
        ConfigError: the settings do not say.
    """
    if cfg.cached_activations_path is None:
        raise ConfigError("cached_activations_path is not set; give the folder in which activations are cached.")
    return str(cfg.cached_activations_path)


def batches_of_run(cfg: MultimodalSAERunnerConfig[Any]) -> int:
    """How many training batches a run takes at most: to estimate norms, to train, to settle thresholds."""
    steps = -(-cfg.training_tokens // cfg.train_batch_size_tokens)
    normalised = cfg.sae.normalize_activations in ("expected_average_only_in", "covariance_whitening")
    settled = "batchtopk" in cfg.sae.architecture()
    return steps + normalised * cfg.n_batches_for_norm_estimate + settled * _FINISHING_BATCHES


def _state(store: MultimodalActivationsStore, done: int) -> dict[str, Any]:
    return {"store": store.state_dict(), "counts": store.counts(), "done": done}


def _write_held_out(store: _CachingStore, writer: CacheWriter) -> None:
    """Cache what is evaluated on, so that training from the cache needs neither model nor dataset."""
    cfg = store.cfg
    if not cfg.n_eval_batches:
        return
    for prompts in store.held_out_batches():
        batch, labels = read_labelled(store, prompts)
        writer.add(batch.activations, labels, len(prompts))
    writer.flush(HELD_OUT, _state(store, 0))


def _about(cfg: MultimodalSAERunnerConfig[Any], store: MultimodalActivationsStore) -> dict[str, Any]:
    return {
        "runner": cfg.to_dict(),
        "dataset": cfg.dataset_path or describe_dataset(store.source.training_rows),
        "d_in": store.d_in,
        "is_of_patches": store.model.hooks.resolve(store.hook_name).tower != "language",
        "n_rows": store.n_rows,
        "n_held_out": store.source.n_held_out,
        "counts": store.counts(),
    }


# ---- foretelling -----------------------------------------------------------------------------------------------------


def forecast_cache(
    cfg: MultimodalSAERunnerConfig[Any], model: VisionLanguageModel, source: PromptSource, folder: Path
) -> CacheForecast:
    """Foretell the size of a cache from the first prompts of the dataset.

    Raises:
        StoreError: the disk has less room than that.
    """
    seen: list[tuple[LabelledBatch, int]] = []
    probe = _CachingStore(model, cfg, source, lambda batch, _, n_prompts: seen.append((batch, n_prompts)))
    batches = source.batches(
        model,
        0,
        batch_size=cfg.store_batch_size_prompts,
        settings=EncodingSettings(cfg.context_size, cfg.too_long),
        skip_rows=0,
        report=SkipReport(),
    )
    for prompts in islice(batches, _PROBED_BATCHES):
        probe.read_tokens(prompts)
    if not seen:
        return CacheForecast(0, 0, 0, _free_bytes(folder))
    n_prompts, n_tokens = _read_by_run(cfg, [(_count_groups(batch), count) for batch, count in seen])
    scale = 1 + cfg.n_eval_prompts / max(n_prompts, 1)
    rows = seen[0][0].activations
    n_bytes = int(n_tokens * scale * (rows.shape[1] * rows.element_size() + LABEL_BYTES))
    return CacheForecast(int(n_prompts * scale), int(n_tokens * scale), n_bytes, _free_bytes(folder))


def _count_groups(batch: LabelledBatch) -> Counter[str]:
    counts: Counter[str] = Counter()
    for code, group in GROUP_OF_MODALITY.items():
        counts[group] += int((batch.modality == code).sum())
    return counts


def _read_by_run(cfg: MultimodalSAERunnerConfig[Any], seen: Sequence[tuple[Counter[str], int]]) -> tuple[int, int]:
    """How many prompts and tokens a run reads if all batches of prompts are like those seen, in turn.

    The buffer is filled again and again until it is full of every modality; what is in surplus is read for nothing.
    """
    buffer = min(cfg.n_batches_in_buffer, -(-cfg.training_tokens // cfg.train_batch_size_tokens))
    handed_out = max(1, buffer - int(buffer * cfg.activations_mixing_fraction))
    batches = [({**counts, "all": counts.total()}, count) for counts, count in seen]
    per_batch = share_counts(cfg.token_shares or {"all": 1.0}, cfg.train_batch_size_tokens)
    # A modality that was not seen tells nothing; the run itself will say if it never comes.
    per_batch = {name: count for name, count in per_batch.items() if any(counts.get(name) for counts, _ in batches)}
    waiting = dict.fromkeys(per_batch, 0)
    n_prompts = n_tokens = at = 0
    for _ in range(-(-batches_of_run(cfg) // handed_out)):
        while any(waiting[name] < count * buffer for name, count in per_batch.items()):
            counts, prompts = batches[at % len(batches)]
            at += 1
            n_prompts += prompts
            n_tokens += counts["all"]
            for name, count in per_batch.items():
                waiting[name] = min(waiting[name] + counts.get(name, 0), count * buffer)
        for name, count in per_batch.items():
            waiting[name] -= count * handed_out
    return n_prompts, n_tokens


def _free_bytes(folder: Path) -> int:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _foretold(
    cfg: MultimodalSAERunnerConfig[Any],
    model: VisionLanguageModel,
    source: PromptSource,
    folder: Path,
    writer: CacheWriter,
) -> str:
    if writer.shards:
        done = sum(shard.n_bytes for shard in writer.shards)
        return f"going on after {len(writer.shards)} shards, {in_units(done)}"
    forecast = forecast_cache(cfg, model, source, folder)
    if forecast.n_bytes * _SPARE > forecast.free_bytes:
        raise StoreError(
            f"The cache {folder} would take {forecast}; free space, give another folder, or lower training_tokens."
        )
    return str(forecast)
