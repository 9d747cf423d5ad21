"""SAE-Lens's trainer, with each modality's explained variance in the progress bar and in the logs."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import Evaluator, SAETrainer, SaveCheckpointFn
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multimodal.training.checkpoint import (
    load_trainer_tree,
    restore_trainer_state,
    save_trainer_tree,
    trainer_state,
    whole_folder,
)
from sae_lens_multimodal.training.log import TrainingLog
from sae_lens_multimodal.training.metrics import MODALITIES, explained_variance_by_modality
from sae_lens_multimodal.training.randomness import random_state, restore_random_state
from sae_lens_multimodal.training.threshold import THRESHOLD_BATCHES, save_with_thresholds, settle_thresholds
from sae_lens_multimodal.training.tokens import LabelledBatch
from sae_lens_multimodal.types import Modality

_SECONDS_BETWEEN_METRICS = 0.5


class BatchProvider(Iterator[Tensor]):
    """Hands out activations as SAE-Lens's trainer expects them, and keeps the modality of the last batch."""

    def __init__(self, batches: Iterator[LabelledBatch], *, prefetch: int = 0) -> None:
        """Wrap labelled batches.

        Args:
            batches: the source.
            prefetch: how many batches a thread in the background prepares ahead; 0 for none.
        """
        self._source = batches
        self._prefetch = prefetch
        self._prefetching: PrefetchingIterator[LabelledBatch] | None = None
        self._ahead: deque[LabelledBatch] = deque()
        self._restored: deque[LabelledBatch] = deque()
        self.modality: Int[Tensor, " n"] = torch.zeros(0, dtype=torch.int8)
        """`Modality` of each token of the batch handed out last."""

    def __next__(self) -> Float[Tensor, "n d"]:
        """The next batch's activations."""
        if self._restored:
            batch = self._restored.popleft()
        elif not self._prefetch:
            batch = next(self._source)
        else:
            if self._prefetching is None:
                # Not before the first batch is asked for: until then a checkpoint may still be loaded into the source.
                self._prefetching = PrefetchingIterator(self._noting(), prefetch=self._prefetch)
            batch = next(self._prefetching)
            self._ahead.popleft()
        self.modality = batch.modality
        return batch.activations

    def _noting(self) -> Iterator[LabelledBatch]:
        """Note what was taken from the source and not yet handed out; it runs while the pause's lock is held."""
        for batch in self._source:
            self._ahead.append(batch)
            yield batch

    def waiting(self) -> list[LabelledBatch]:
        """The batches that were taken from the source and not yet handed out; ask for them while `paused`."""
        return [*self._restored, *self._ahead]

    def restore(self, batches: Sequence[LabelledBatch]) -> None:
        """Hand these batches out first."""
        self._restored = deque(batches)

    def paused(self) -> AbstractContextManager[None]:
        """Keep the background thread, if there is one, away from the model."""
        return self._prefetching.paused() if self._prefetching is not None else nullcontext()

    def close(self) -> None:
        """Stop the background thread, if there is one."""
        if self._prefetching is not None:
            self._prefetching.close()


class MultimodalSAETrainer(SAETrainer[TrainingSAE[Any], Any]):
    """Trains as SAE-Lens does, step for step; adds what is known about the tokens' modality."""

    data_provider: BatchProvider
    act_freq_scores: Tensor
    n_forward_passes_since_fired: Tensor

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: TrainingSAE[Any],
        data_provider: BatchProvider,
        evaluator: Evaluator[TrainingSAE[Any]] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        *,
        progress: bool = True,
        balanced_threshold: bool = True,
    ) -> None:
        """See SAE-Lens.

        Args:
            cfg: see SAE-Lens.
            sae: see SAE-Lens.
            data_provider: training batches.
            evaluator: see SAE-Lens.
            save_checkpoint_fn: see SAE-Lens.
            progress: whether to draw a progress bar.
            balanced_threshold: whether a BatchTopK SAE is saved with thresholds that do right by each modality.
        """
        super().__init__(cfg, sae, data_provider, evaluator, save_checkpoint_fn)
        self.progress = progress
        self.balanced_threshold = balanced_threshold
        self.thresholds: Float[Tensor, " d_sae"] | None = None
        """With which a BatchTopK SAE is saved, once training is through."""
        self.stop_requested = False
        self.is_finished = False
        """Whether the weights are final: a checkpoint of them needs no further step."""
        self.tokens_seen: Counter[str] = Counter()
        """Tokens trained on, by modality."""
        self.log: TrainingLog | None = None
        """Where numbers are written besides wandb."""
        self._last_display = 0.0
        self._random_state: dict[str, Any] | None = None

    def request_stop(self) -> None:
        """Stop before the next step."""
        self.stop_requested = True

    def fit(self) -> TrainingSAE[Any]:
        """Train to the end.

        Raises:
            InterruptedException: `stop_requested` was set.
        """
        self.sae.to(self.cfg.device)
        if self.is_finished:
            return self.sae
        self._estimate_normalisation()
        with tqdm(
            total=self.cfg.total_training_samples,
            initial=self.n_training_samples,
            desc="Training SAE",
            unit="tok",
            unit_scale=True,
            disable=not self.progress,
        ) as bar:
            while self.n_training_samples < self.cfg.total_training_samples:
                if self.stop_requested:
                    raise InterruptedException
                self._train_one_batch(bar)
        self._log_sparsity(self.full_sparsity_window_log())
        self.finish()
        self.set_final_sae_metadata()
        self.is_finished = True
        if self.cfg.save_final_checkpoint:
            self.save_checkpoint(checkpoint_name=f"final_{self.n_training_samples}")
        return self.sae

    def finish(self) -> None:
        """Make the SAE, once it is trained, what is to be saved: one that takes plain activations, token by token."""
        self._fold_normalisation()
        if isinstance(self.sae, BatchTopKTrainingSAE) and self.n_training_steps:
            self.thresholds = settle_thresholds(self.sae, self._labelled_batches(), balanced=self.balanced_threshold)

    @property
    def n_batches_to_finish(self) -> int:
        """How many further batches `finish` takes at most."""
        return THRESHOLD_BATCHES if isinstance(self.sae, BatchTopKTrainingSAE) else 0

    def _labelled_batches(self) -> Iterator[LabelledBatch]:
        for activations in self.data_provider:
            yield LabelledBatch(activations, self.data_provider.modality)

    def _train_one_batch(self, bar: tqdm[Any]) -> None:
        self._log_sparsity(self.maybe_reset_sparsity())
        output = self.step(next(self.data_provider))
        self._log_train_step(output)
        self._run_and_log_evals()
        self.n_training_steps += 1
        self._update_pbar(output, bar)
        # After the step is counted, unlike SAE-Lens: what goes on from here must not count it again.
        self._checkpoint_if_needed()

    def save_checkpoint(
        self, checkpoint_name: str, base_path: Path | str | None = None, wandb_aliases: list[str] | None = None
    ) -> None:
        """Save a checkpoint, whole or not at all.

        Raises:
            StoreError: it cannot be written; earlier checkpoints are as they were.
        """
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        with self.data_provider.paused():
            if base is None:
                super().save_checkpoint(checkpoint_name, wandb_aliases=wandb_aliases)
                return
            with whole_folder(Path(base) / checkpoint_name) as folder:
                super().save_checkpoint(checkpoint_name, base_path=folder.parent, wandb_aliases=wandb_aliases)

    def save_trainer_state(self, checkpoint_path: Path) -> None:
        """Write everything that later steps depend on, SAE-Lens's part and this package's, without pickle."""
        self.activation_scaler.save(str(checkpoint_path / ACTIVATION_SCALER_CFG_FILENAME))
        tree = {
            "trainer": trainer_state(self),
            "random": random_state(),
            "waiting": [tuple(batch) for batch in self.data_provider.waiting()],
            "is_finished": self.is_finished,
            "thresholds": self.thresholds,
        }
        save_trainer_tree(checkpoint_path, tree)

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Be where `save_trainer_state` was; load the SAE's weights first.

        Raises:
            StoreError: the state is missing or damaged.
        """
        folder = Path(checkpoint_path)
        self.activation_scaler.load(folder / ACTIVATION_SCALER_CFG_FILENAME)
        tree = load_trainer_tree(folder)
        restore_trainer_state(self, tree["trainer"])
        self.data_provider.restore([LabelledBatch(*batch) for batch in tree["waiting"]])
        self.is_finished = tree["is_finished"]
        self.thresholds = tree["thresholds"]
        if self.thresholds is not None:
            save_with_thresholds(self.sae, self.thresholds)
        self._random_state = tree["random"]

    def restore_randomness(self) -> None:
        """Put all generators where the checkpoint was, if one was loaded; call it where the run has seeded them."""
        if self._random_state is not None:
            restore_random_state(self._random_state)

    def step(self, batch: Float[Tensor, "n d"]) -> TrainStepOutput:
        """One training step; counts its tokens by modality."""
        counts = torch.bincount(self.data_provider.modality.long(), minlength=len(Modality)).tolist()
        self.tokens_seen.update({code.name.lower(): counts[code] for code in Modality if counts[code]})
        return super().step(batch)

    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        """What SAE-Lens logs, with each modality's explained variance and number of features that fire."""
        logged: dict[str, Any] = super().build_train_step_log_dict(output, n_training_samples)
        for name, value in self._explained_variance(output).items():
            if value is not None:
                logged[f"metrics/explained_variance_{name}"] = value
        modality = self.data_provider.modality.to(output.feature_acts.device)
        l0 = output.feature_acts.bool().float().sum(-1).to_dense()
        for name, code in MODALITIES.items():
            if (modality == code).any():
                logged[f"metrics/l0_{name}"] = l0[modality == code].mean().item()
        return logged

    @torch.no_grad()
    def _explained_variance(self, output: TrainStepOutput) -> dict[str, float | None]:
        return explained_variance_by_modality(output.sae_in, output.sae_out, self.data_provider.modality)

    @torch.no_grad()
    def _update_pbar(self, step_output: TrainStepOutput, pbar: tqdm[Any], update_interval: int = 1) -> None:
        pbar.update(update_interval * self.cfg.train_batch_size_samples)
        is_last = self.n_training_samples >= self.cfg.total_training_samples
        if pbar.disable or (not is_last and time.monotonic() - self._last_display < _SECONDS_BETWEEN_METRICS):
            return
        self._last_display = time.monotonic()
        explained = ", ".join(
            f"{name} {value:.3f}" for name, value in self._explained_variance(step_output).items() if value is not None
        )
        pbar.set_postfix_str(f"explained variance: {explained} | loss {step_output.loss.item():.4g}")

    def _log_sparsity(self, logged: dict[str, Any]) -> None:
        if logged:
            self.record(logged)

    def record(self, values: Mapping[str, Any]) -> None:
        """Log numbers of this step: to the local log, if there is one, and to wandb, if that is on."""
        self.log_numbers(values)
        if self.cfg.logger.log_to_wandb:
            import wandb

            wandb.log(dict(values), step=self.n_training_steps)

    def log_numbers(self, values: Mapping[str, Any]) -> None:
        """Write numbers of this step to the local log alone, if there is one."""
        if self.log is not None:
            self.log.write(values, step=self.n_training_steps, tokens=self.n_training_samples)

    @torch.no_grad()
    def log_locally(self, step_output: TrainStepOutput) -> None:
        """Write this step to the local log alone, every `wandb_log_frequency` steps."""
        if self.log is not None and (self.n_training_steps + 1) % self.cfg.logger.wandb_log_frequency == 0:
            self.log_numbers(self.build_train_step_log_dict(step_output, self.n_training_samples))

    @property
    def _is_logging(self) -> bool:
        return self.log is not None or self.cfg.logger.log_to_wandb

    @torch.no_grad()
    def _log_train_step(self, step_output: TrainStepOutput) -> None:
        """Log every `wandb_log_frequency` steps, wherever to."""
        if self._is_logging and (self.n_training_steps + 1) % self.cfg.logger.wandb_log_frequency == 0:
            self.record(self.build_train_step_log_dict(step_output, self.n_training_samples))

    @torch.no_grad()
    def _run_and_log_evals(self) -> None:
        """Evaluate on held-out prompts every `eval_every_n_wandb_logs` logged steps."""
        every = self.cfg.logger.wandb_log_frequency * self.cfg.logger.eval_every_n_wandb_logs
        if not self._is_logging or (self.n_training_steps + 1) % every:
            return
        self.sae.eval()
        logged = {}
        if self.evaluator is not None:
            logged = dict(self.evaluator(self.sae, self.data_provider, self.activation_scaler))
        if self.cfg.logger.log_to_wandb:
            import wandb

            logged.update({name: wandb.Histogram(value) for name, value in self.sae.log_histograms().items()})
        self.record(logged)
        self.sae.train()

    def _estimate_normalisation(self) -> None:
        """Estimate what `normalize_activations` needs, unless a checkpoint brought it."""
        kind, scaler = self.sae.cfg.normalize_activations, self.activation_scaler
        batches = self.cfg.n_batches_for_norm_estimate
        if kind == "expected_average_only_in" and scaler.scaling_factor is None:
            scaler.estimate_scaling_factor(self.sae.cfg.d_in, self.data_provider, batches)
        elif kind == "covariance_whitening" and scaler.whitening is None:
            scaler.estimate_whitening(self.sae.cfg.d_in, self.data_provider, batches)

    def _fold_normalisation(self) -> None:
        """Put what was estimated into the weights, so that the saved SAE takes plain activations."""
        scaler = self.activation_scaler
        if scaler.scaling_factor is not None:
            self.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
            scaler.scaling_factor = None
        if scaler.whitening is not None:
            whitening, scaler.whitening = scaler.whitening, None
            self.sae.fold_activation_whitening(
                mean=whitening.mean,
                whitening_matrix=whitening.matrix,
                unwhitening_matrix=whitening.inverse_matrix,
            )
