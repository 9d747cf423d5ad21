"""Activations for training: read from the model as they are needed, balanced, shuffled, labelled with modality."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import str_to_dtype
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.batches import PromptBatch, encoded_batches
from sae_lens_multimodal.data.rows import SkipReport
from sae_lens_multimodal.data.sources import Rows, open_dataset
from sae_lens_multimodal.errors import ConfigError, DatasetError, SAEMismatchError, StoreError
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig
from sae_lens_multimodal.training.pools import Pool, share_counts
from sae_lens_multimodal.training.prompts import PromptSource
from sae_lens_multimodal.training.tokens import GROUP_OF_MODALITY, LabelledBatch, TokenChoice, read_tokens

logger = logging.getLogger(__name__)

_ALL = "all"
_PATIENCE_PROMPTS = 2000
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
        self._skipped: Counter[str] = Counter()
        self._dropped_before = 0
        self._report = SkipReport()
        self._next_row = 0
        self._generator = torch.Generator().manual_seed(cfg.seed)
        shares = cfg.token_shares or {_ALL: 1.0}
        self._counts = share_counts(shares, cfg.train_batch_size_tokens)
        self._pools = {
            name: Pool(count * self.n_batches_in_buffer, self._generator, self.device)
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
        override_dataset: Rows | None = None,
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
    def all_skipped(self) -> Counter[str]:
        """Rows that were skipped, by reason."""
        return self._skipped + self._report.reasons

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
        activations, modality = self.read_tokens(prompts)
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
            if self._prompts_since[name] >= _PATIENCE_PROMPTS:
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

    def read_tokens(self, prompts: PromptBatch) -> LabelledBatch:
        """Run the model up to the hook, and keep the tokens to train on.

        Raises:
            SAEMismatchError: the activations have another width than the SAE.
            ConfigError: the activations are not one vector of finite numbers for each token.
        """
        read = read_tokens(self.model, prompts.batch, self.hook_name, self.choice, autocast=self.autocast_lm)
        width = read.activations.shape[1]
        if width != self.d_in:
            raise SAEMismatchError(
                f"{self.hook_name} of {self.model.name} gives {width} values a token, but sae.d_in is {self.d_in}; set "
                f"sae.d_in to {width} or choose another hook."
            )
        return read

    def _iterate_prompt_batches(self) -> Iterator[PromptBatch]:
        """Prompts without end, epoch after epoch."""
        while True:
            report = self._report = SkipReport()
            first_row = self._next_row
            prompts = self.source.epoch(self.epoch, skip_rows=first_row, report=report)
            try:
                for batch in encoded_batches(
                    self.model,
                    prompts,
                    batch_size=self.store_batch_size_prompts,
                    context_size=self.context_size,
                    report=report,
                ):
                    row = batch.prompts[-1].row + 1
                    self.n_dataset_processed += row - self._next_row
                    self._next_row = row
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
        self._skipped += report.reasons
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

    def state_dict(self) -> dict[str, Tensor]:
        """Where in the dataset the run is. The buffer is not part of it: it is filled anew."""
        return {
            "n_dataset_processed": torch.tensor(self.n_dataset_processed),
            "epoch": torch.tensor(self.epoch),
            "next_row": torch.tensor(self._next_row),
            "generator": self._generator.get_state(),
        }

    def save(self, file_path: str) -> None:
        """Write the state to a safetensors file."""
        save_file(self.state_dict(), file_path)

    def load(self, file_path: str) -> None:
        """Go on where a saved state was; rows before it are passed over, not decoded.

        Raises:
            StoreError: the file is another store's.
        """
        state = load_file(file_path)
        missing = set(self.state_dict()) - set(state)
        if missing:
            raise StoreError(f"{file_path} lacks {sorted(missing)}; give a checkpoint of a multimodal training run.")
        self.n_dataset_processed = int(state["n_dataset_processed"])
        self.epoch = int(state["epoch"])
        self._next_row = int(state["next_row"])
        self._generator.set_state(state["generator"])
        self._prompt_batches = self._iterate_prompt_batches()

    def counts(self) -> dict[str, Any]:
        """What was read, dropped and skipped since the run began, as JSON values."""
        return {
            "tokens_read": dict(self.tokens_read),
            "tokens_dropped": self.tokens_dropped,
            "rows_skipped": dict(self.all_skipped),
        }

    def restore_counts(self, counts: Mapping[str, Any]) -> None:
        """Go on counting where `counts` of an earlier part of the run ended; call it before the first batch."""
        self.tokens_read = Counter(counts["tokens_read"])
        self._dropped_before = int(counts["tokens_dropped"])
        self._skipped = Counter(counts["rows_skipped"])

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
        excluded_ids=tuple(excluded) if isinstance(excluded, list) else (),
    )


def open_source(cfg: MultimodalSAERunnerConfig[Any], override_dataset: Rows | None = None) -> PromptSource:
    """Open a run's dataset and hold some of it out.

    Raises:
        ConfigError: the configuration names no dataset and none is given.
        DatasetError: the dataset cannot be opened.
    """
    if override_dataset is None and not cfg.dataset_path:
        raise ConfigError("dataset_path is empty; give a hub name, a folder or a file, or pass override_dataset.")
    rows = open_dataset(
        override_dataset if override_dataset is not None else cfg.dataset_path,
        split=cfg.split,
        streaming=cfg.streaming,
        subset=cfg.dataset_subset,
    )
    return PromptSource.split(
        rows,
        held_out=cfg.n_eval_prompts,
        seed=cfg.seed,
        shuffle_buffer_rows=cfg.shuffle_buffer_rows,
        strict=cfg.strict,
        image_folder=cfg.image_folder,
    )
