"""Activations for training: read from the model as they are needed, balanced, shuffled, labelled with modality."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import str_to_dtype
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.batches import EncodingSettings, PromptBatch, encoded_batches
from sae_lens_multimodal.data.mixture import Mixture
from sae_lens_multimodal.data.rows import SkipReport
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.errors import ConfigError, DatasetError, SAEMismatchError, StoreError
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig
from sae_lens_multimodal.training.pools import Pool, share_counts
from sae_lens_multimodal.training.prompts import PromptSource, open_source
from sae_lens_multimodal.training.tokens import GROUP_OF_MODALITY, LabelledBatch, TokenChoice, read_tokens
from sae_lens_multimodal.training.tree_file import load_tree, save_tree

logger = logging.getLogger(__name__)

_ALL = "all"
PATIENCE_PROMPTS = 2000
"""So many prompts in a row may lack a modality that `token_shares` asks for before the run gives up."""
_MOSTLY_DROPPED = 0.8
"""Share of tokens that may find no room before it is worth a word."""


class MultimodalActivationsStore(ActivationsStore):
    """SAE-Lens's activations store, fed with prompts that hold pictures.

    Every batch has exactly `train_batch_size_tokens` tokens, and with `token_shares` exactly those shares of each
    modality. Iterating gives the activations alone; `next_labelled` gives their modality as well.
    """

    model: Any
    """The vision-language model."""

    def __init__(self, model: VisionLanguageModel, cfg: MultimodalSAERunnerConfig[Any], source: PromptSource) -> None:
        """Prepare to read; the model runs for the first time when the first batch is asked for.

        SAE-Lens's own initialiser is not called: it demands a text column, and narrows the caller's dataset to it.
        """
        self.model = model
        self.cfg = cfg
        self.source = source
        self.dataset = source.training_rows
        self.hook_name = cfg.hook_name
        self.hook_head_index = None
        self.context_size = self.training_context_size = cfg.context_size
        self.d_in = cfg.sae.d_in
        self.total_training_tokens = cfg.training_tokens
        self.store_batch_size_prompts = cfg.store_batch_size_prompts
        self.train_batch_size_tokens = cfg.train_batch_size_tokens
        self.normalize_activations = cfg.sae.normalize_activations
        self.device = torch.device(cfg.act_store_device or cfg.device)
        self.dtype = str_to_dtype(cfg.dtype)
        self.cached_activations_path = None
        self.cached_activation_dataset = None
        self.autocast_lm = cfg.autocast_lm
        self.seqpos_slice = cfg.seqpos_slice
        self.activations_mixing_fraction = cfg.activations_mixing_fraction
        self.choice = token_choice(cfg)
        # A run that is shorter than the buffer need not fill it.
        self.n_batches_in_buffer = min(cfg.n_batches_in_buffer, -(-cfg.training_tokens // cfg.train_batch_size_tokens))

        self.n_dataset_processed = 0
        self.epoch = 0
        self.tokens_read: Counter[str] = Counter()
        self.outliers: Counter[str] = Counter()
        """Tokens left out for their norm, by modality."""
        self._earlier_rows = SkipReport()
        self._dropped_before = 0
        self._report = SkipReport()
        self._next_row = 0
        self._generator = torch.Generator().manual_seed(cfg.seed)
        shares = cfg.token_shares or {_ALL: 1.0}
        self._counts = share_counts(shares, cfg.train_batch_size_tokens)
        self._pools = {
            # Alone, a pool is read for until it is full and no further; what is read beyond that need not be lost.
            name: Pool(
                count * self.n_batches_in_buffer, self._generator, self.device, keep_surplus=len(self._counts) == 1
            )
            for name, count in self._counts.items()
        }
        self._batches_left = 0
        self._prompts_since = dict.fromkeys(self._pools, 0)
        self._epoch_tokens: Counter[str] = Counter()
        self._prompt_batches = self._iterate_prompt_batches()

    @classmethod
    def from_config(
        cls,
        model: VisionLanguageModel,
        cfg: MultimodalSAERunnerConfig[Any],
        override_dataset: Rows | Mixture | None = None,
    ) -> MultimodalActivationsStore:
        """Open the dataset that the configuration names, or take the one given.

        Raises:
            ConfigError: there is neither.
            DatasetError: the dataset cannot be opened.
        """
        return cls(model, cfg, open_source(cfg, override_dataset))

    # ---- batches -----------------------------------------------------------------------------------------------------

    def __next__(self) -> Float[Tensor, "n d"]:
        """The activations of the next training batch."""
        return self.next_labelled().activations

    def labelled_batches(self) -> Iterator[LabelledBatch]:
        """Endlessly many training batches with the modality of each token."""
        while True:
            yield self.next_labelled()

    @torch.no_grad()
    def next_labelled(self) -> LabelledBatch:
        """The next training batch with the modality of each token.

        Raises:
            DatasetError: the dataset has no tokens of a modality that `token_shares` asks for.
        """
        if self._batches_left == 0:
            self._refill()
        self._batches_left -= 1
        size = self.train_batch_size_tokens
        order = torch.randperm(size, generator=self._generator)
        activations = torch.empty(size, self.d_in, dtype=self.dtype, device=self.device)
        modality = torch.empty(size, dtype=torch.int8)
        start = 0
        for name, count in self._counts.items():
            rows, labels = self._pools[name].take(count)
            places = order[start : start + count]
            activations[places.to(self.device)] = rows.to(self.dtype)
            modality[places] = labels
            start += count
        return LabelledBatch(activations, modality)

    @property
    def n_rows(self) -> int | None:
        """How many rows there are to train on; None for a stream."""
        return len(self.dataset) if isinstance(self.dataset, Sized) else None

    @property
    def all_skipped(self) -> Counter[str]:
        """Rows that were skipped, by reason."""
        return self.row_report.reasons

    @property
    def row_report(self) -> SkipReport:
        """What was read, skipped and cut since the run began; rows of several epochs count in each."""
        report = SkipReport()
        report.add(self._earlier_rows)
        report.add(self._report)
        return report

    @property
    def tokens_dropped(self) -> int:
        """Tokens that were read and found no room: those of a modality in surplus."""
        return self._dropped_before + sum(pool.dropped for pool in self._pools.values())

    def _refill(self) -> None:
        for pool in self._pools.values():
            pool.begin_refill()
        before = self.tokens_dropped, self.tokens_read.total()
        while not all(pool.is_full for pool in self._pools.values()):
            self._read_into_pools(next(self._prompt_batches))
        kept_for_mixing = int(self.n_batches_in_buffer * self.activations_mixing_fraction)
        self._batches_left = max(1, self.n_batches_in_buffer - kept_for_mixing)
        self._report_surplus(self.tokens_dropped - before[0], self.tokens_read.total() - before[1])

    def _read_into_pools(self, prompts: PromptBatch) -> None:
        activations, modality = self.read_tokens(prompts, outliers=self.outliers)
        for code, group in GROUP_OF_MODALITY.items():
            self.tokens_read[group] += int((modality == code).sum())
        for name, pool in self._pools.items():
            if name == _ALL:
                rows, labels = activations, modality
            else:
                codes = [int(code) for code, group in GROUP_OF_MODALITY.items() if group == name]
                mask = torch.isin(modality, torch.tensor(codes, dtype=modality.dtype))
                rows, labels = activations[mask.to(activations.device)], modality[mask]
            pool.add(rows, labels)
            self._epoch_tokens[name] += len(labels)
            self._prompts_since[name] = 0 if len(labels) else self._prompts_since[name] + len(prompts)
            if self._prompts_since[name] >= PATIENCE_PROMPTS:
                raise self._nothing_comes(name, f"the last {self._prompts_since[name]} prompts")

    def _report_surplus(self, dropped: int, read: int) -> None:
        if read and dropped / read > _MOSTLY_DROPPED:
            logger.warning(
                "%.0f%% of the tokens read are dropped to keep token_shares=%s; the dataset has far more of one "
                "modality: shares nearer to what it holds train faster",
                100 * dropped / read,
                self.cfg.token_shares,
            )

    def _nothing_comes(self, name: str, where: str) -> DatasetError:
        if name == _ALL:
            return DatasetError(
                f"No token of {where} can be trained on with image_tokens={self.cfg.image_tokens!r}; choose other "
                "tokens or another dataset."
            )
        return DatasetError(
            f"token_shares asks for {self.cfg.token_shares[name]:.0%} {name} tokens, but {where} hold none; change "  # type: ignore[index]
            f"token_shares or give a dataset with {'pictures' if name == 'image' else 'text'}."
        )

    # ---- reading -----------------------------------------------------------------------------------------------------

    def read_tokens(self, prompts: PromptBatch, *, outliers: Counter[str] | None = None) -> LabelledBatch:
        """Run the model up to the hook, and keep the tokens to train on; those left out for their norm are counted.

        Raises:
            SAEMismatchError: the activations have another width than the SAE.
            ConfigError: the activations are not one vector of finite numbers for each token.
        """
        read = read_tokens(
            self.model, prompts.batch, self.hook_name, self.choice, autocast=self.autocast_lm, outliers=outliers
        )
        width = read.activations.shape[1]
        if len(read.activations) and width != self.d_in:
            raise SAEMismatchError(
                f"{self.hook_name} of {self.model.name} gives {width} values a token, but sae.d_in is {self.d_in}; set "
                f"sae.d_in to {width} or choose another hook."
            )
        return read

    def held_out_batches(self) -> Iterator[PromptBatch]:
        """The prompts to evaluate on, encoded."""
        return encoded_batches(
            self.model,
            self.source.evaluation(self.cfg.n_eval_prompts),
            batch_size=self.cfg.eval_batch_prompts,
            context_size=self.context_size,
            too_long=self.cfg.too_long,
        )

    def held_out_tokens(self) -> Iterator[LabelledBatch]:
        """The tokens to evaluate on."""
        return (self.read_tokens(batch) for batch in self.held_out_batches())

    def _iterate_prompt_batches(self) -> Generator[PromptBatch, None, None]:
        """Prompts without end, epoch after epoch."""
        while True:
            report = self._report = SkipReport()
            first_row = self._next_row
            batches = self.source.batches(
                self.model,
                self.epoch,
                batch_size=self.store_batch_size_prompts,
                settings=EncodingSettings(self.context_size, self.cfg.too_long),
                skip_rows=first_row,
                report=report,
                n_workers=self.cfg.n_data_workers,
            )
            try:
                for batch in batches:
                    self.n_dataset_processed += batch.next_row - self._next_row
                    self._next_row = batch.next_row
                    yield batch
            except DatasetError as error:
                if report.read == 0 and self.source.n_held_out:
                    raise DatasetError(
                        f"All rows of the dataset are held out for evaluation ({self.source.n_held_out} at most); "
                        "lower n_eval_batches (0 holds out none) or give more rows."
                    ) from error
                raise
            self._end_epoch(report, whole=first_row == 0)

    def _end_epoch(self, report: SkipReport, *, whole: bool) -> None:
        self._earlier_rows.add(report)
        self._report = SkipReport()
        if whole:
            for name in self._pools:
                if not self._epoch_tokens[name]:
                    raise self._nothing_comes(name, "all prompts of the dataset")
        self._epoch_tokens.clear()
        logger.info("epoch %d of the dataset is over: %s", self.epoch + 1, report.summary())
        self.epoch += 1
        self._next_row = 0

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the batches to come depend on: the place in the dataset, the generator and the buffer."""
        return {
            "n_dataset_processed": self.n_dataset_processed,
            "epoch": self.epoch,
            "next_row": self._next_row,
            "batches_left": self._batches_left,
            "prompts_since": dict(self._prompts_since),
            "epoch_tokens": dict(self._epoch_tokens),
            "generator": self._generator.get_state(),
            "pools": {name: pool.snapshot() for name, pool in self._pools.items()},
        }

    def save(self, file_path: str) -> None:
        """Write the state to a safetensors file."""
        save_tree(Path(file_path), self.state_dict())

    def load(self, file_path: str) -> None:
        """Go on where a saved state was; rows before it are passed over, not decoded.

        Raises:
            StoreError: the file is another store's.
        """
        self.load_state(load_tree(Path(file_path)), file_path)

    def load_state(self, state: Mapping[str, Any], origin: str = "the state") -> None:
        """Go on where `state_dict` was.

        Raises:
            StoreError: it is another store's.
        """
        missing = {"n_dataset_processed", "epoch", "next_row", "batches_left", "generator", "pools"} - set(state)
        if missing:
            raise StoreError(f"{origin} lacks {sorted(missing)}; give a checkpoint of a multimodal training run.")
        if set(state["pools"]) != set(self._pools):
            raise StoreError(
                f"{origin} was written with pools for {sorted(state['pools'])}, this run has {sorted(self._pools)}; "
                "go on with the same token_shares."
            )
        self.n_dataset_processed = state["n_dataset_processed"]
        self.epoch = state["epoch"]
        self._next_row = state["next_row"]
        self._batches_left = state["batches_left"]
        self._prompts_since = dict(state["prompts_since"])
        self._epoch_tokens = Counter(state["epoch_tokens"])
        self._generator.set_state(state["generator"])
        for name, pool in self._pools.items():
            self._restore_pool(name, pool, state["pools"][name])
        self._prompt_batches = self._iterate_prompt_batches()

    def _restore_pool(self, name: str, pool: Pool, state: Mapping[str, Tensor]) -> None:
        try:
            pool.restore(state)
        except IndexError as error:
            raise StoreError(
                f"The checkpoint's buffer of {name} tokens is larger than this run's; go on with the same "
                "n_batches_in_buffer, train_batch_size_tokens and token_shares."
            ) from error

    def counts(self) -> dict[str, Any]:
        """What was read, dropped and skipped since the run began, as JSON values."""
        return {
            "tokens_read": dict(self.tokens_read),
            "tokens_dropped": self.tokens_dropped,
            "tokens_outlying": dict(self.outliers),
            "rows": self.row_report.to_dict(),
        }

    def finish_reading(self) -> None:
        """End the threads that read ahead, and list the rows that could not be used; asking for more begins anew."""
        self._prompt_batches.close()
        self._prompt_batches = self._iterate_prompt_batches()
        self._earlier_rows.add(self._report)
        self._report = SkipReport()
        for line in self.row_report.lines():
            logger.warning("%s", line)

    def restore_counts(self, counts: Mapping[str, Any]) -> None:
        """Go on counting where `counts` of an earlier part of the run ended; call it before the first batch."""
        self.tokens_read = Counter(counts["tokens_read"])
        self._dropped_before = int(counts["tokens_dropped"])
        self.outliers = Counter(counts.get("tokens_outlying", {}))
        self._earlier_rows = SkipReport.from_dict(counts["rows"])

    # ---- SAE-Lens's own interface ------------------------------------------------------------------------------------

    def get_batch_tokens(self, *_: object, **__: object) -> Tensor:
        """Refuse: token ids alone do not hold the pictures.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "A prompt with pictures is more than its token ids; evaluate with "
            "sae_lens_multimodal.training.evaluate.evaluate_reconstruction."
        )

    def get_activations(self, batch_tokens: PromptBatch) -> Float[Tensor, "n d"]:
        """The activations of a batch of prompts, of the tokens to train on."""
        return self.read_tokens(batch_tokens).activations

    def get_raw_llm_batch(self, raise_on_epoch_end: bool = False) -> tuple[Tensor, Tensor]:
        """The next prompts' activations and, where SAE-Lens has token ids, their modality."""
        activations, modality = self.read_tokens(next(self._prompt_batches))
        return activations, modality

    def get_filtered_llm_batch(self, raise_on_epoch_end: bool = False) -> Tensor:
        """The next prompts' activations."""
        return self.get_raw_llm_batch(raise_on_epoch_end)[0]

    def get_data_loader(self) -> Iterator[Tensor]:
        """Endlessly many training batches."""
        while True:
            yield next(self)

    def reset_input_dataset(self) -> None:
        """Begin at the dataset's first row again."""
        self._next_row = 0
        self._prompt_batches = self._iterate_prompt_batches()


def token_choice(cfg: MultimodalSAERunnerConfig[Any]) -> TokenChoice:
    """Which tokens a run trains on."""
    excluded = cfg.exclude_special_tokens
    return TokenChoice(
        image_tokens=cfg.image_tokens,
        newline_tokens=cfg.newline_tokens,
        max_norm_ratio=cfg.max_norm_ratio,
        excluded_ids=tuple(excluded) if isinstance(excluded, list) else (),
    )
