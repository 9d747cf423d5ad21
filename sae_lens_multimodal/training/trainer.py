"""SAE-Lens's trainer, with each modality's explained variance in the progress bar and in the logs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import Evaluator, SAETrainer, SaveCheckpointFn
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multimodal.training.metrics import MODALITIES, explained_variance_by_modality
from sae_lens_multimodal.training.tokens import LabelledBatch
from sae_lens_multimodal.types import Modality

_SECONDS_BETWEEN_METRICS = 0.5
_THRESHOLD_BATCHES = 10


class BatchProvider(Iterator[Tensor]):
    """Hands out activations as SAE-Lens's trainer expects them, and keeps the modality of the last batch."""

    def __init__(self, batches: Iterator[LabelledBatch], *, prefetch: int = 0) -> None:
        """Wrap labelled batches.

        Args:
            batches: the source.
            prefetch: how many batches a thread in the background prepares ahead; 0 for none.
        """
        self._prefetching = PrefetchingIterator(batches, prefetch=prefetch) if prefetch else None
        self._batches: Iterator[LabelledBatch] = self._prefetching or batches
        self.modality: Int[Tensor, " n"] = torch.zeros(0, dtype=torch.int8)
        """`Modality` of each token of the batch handed out last."""

    def __next__(self) -> Float[Tensor, "n d"]:
        """The next batch's activations."""
        batch = next(self._batches)
        self.modality = batch.modality
        return batch.activations

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

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: TrainingSAE[Any],
        data_provider: BatchProvider,
        evaluator: Evaluator[TrainingSAE[Any]] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        *,
        progress: bool = True,
    ) -> None:
        """See SAE-Lens; `progress` is whether to draw a progress bar."""
        super().__init__(cfg, sae, data_provider, evaluator, save_checkpoint_fn)
        self.progress = progress
        self.stop_requested = False
        self.tokens_seen: Counter[str] = Counter()
        """Tokens trained on, by modality."""
        self._last_display = 0.0

    def request_stop(self) -> None:
        """Stop before the next step."""
        self.stop_requested = True

    def fit(self) -> TrainingSAE[Any]:
        """Train to the end.

        Raises:
            InterruptedException: `stop_requested` was set.
        """
        self.sae.to(self.cfg.device)
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
        self._settle_threshold()
        self._fold_normalisation()
        self.set_final_sae_metadata()
        if self.cfg.save_final_checkpoint:
            self.save_checkpoint(checkpoint_name=f"final_{self.n_training_samples}")
        return self.sae

    def _train_one_batch(self, bar: tqdm[Any]) -> None:
        self._log_sparsity(self.maybe_reset_sparsity())
        output = self.step(next(self.data_provider))
        if self.cfg.logger.log_to_wandb:
            self._log_train_step(output)
            self._run_and_log_evals()
        self._checkpoint_if_needed()
        self.n_training_steps += 1
        self._update_pbar(output, bar)

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
        if logged and self.cfg.logger.log_to_wandb:
            import wandb

            wandb.log(logged, step=self.n_training_steps)

    def _estimate_normalisation(self) -> None:
        """Estimate what `normalize_activations` needs, unless a checkpoint brought it."""
        kind, scaler = self.sae.cfg.normalize_activations, self.activation_scaler
        batches = self.cfg.n_batches_for_norm_estimate
        if kind == "expected_average_only_in" and scaler.scaling_factor is None:
            scaler.estimate_scaling_factor(self.sae.cfg.d_in, self.data_provider, batches)
        elif kind == "covariance_whitening" and scaler.whitening is None:
            scaler.estimate_whitening(self.sae.cfg.d_in, self.data_provider, batches)

    @torch.no_grad()
    def _settle_threshold(self) -> None:
        """After a short run, estimate BatchTopK's threshold from the final weights.

        SAE-Lens keeps a running mean that begins at zero and remembers early weights: for about a thousand steps
        it is far too low, and the saved SAE would let several times `k` features fire.
        """
        sae = self.sae
        if not isinstance(sae, BatchTopKTrainingSAE) or not 0 < self.n_training_steps < 10 / sae.cfg.topk_threshold_lr:
            return
        lowest = []
        for _ in range(_THRESHOLD_BATCHES):
            features = sae.encode(self.activation_scaler(next(self.data_provider).to(sae.device)))
            values = features.coalesce().values() if features.is_sparse else features
            positive = values[values > 0]
            if len(positive):
                lowest.append(positive.min().double())
        if lowest:
            sae.topk_threshold = torch.stack(lowest).mean()

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
