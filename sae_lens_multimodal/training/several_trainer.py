"""SAE-Lens's trainer of several SAEs, each trained step for step as it would be alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.multi_sae_trainer import MultiSAEEvaluatorProtocol, MultiSAETrainer
from sae_lens.training.sae_trainer import SaveCheckpointFn
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multimodal.training.checkpoint import whole_folder
from sae_lens_multimodal.training.randomness import random_state, restore_random_state
from sae_lens_multimodal.training.several_store import SeveralHooksStore
from sae_lens_multimodal.training.tokens import LabelledBatch
from sae_lens_multimodal.training.trainer import BatchProvider, MultimodalSAETrainer
from sae_lens_multimodal.training.tree_file import load_tree, save_tree

_STATE_NAME = "several_state.safetensors"


class SharedBatches(Iterator[dict[str, Tensor]]):
    """Hands each hook its part of every batch, as SAE-Lens's trainer of several SAEs expects them."""

    def __init__(self, store: SeveralHooksStore, provider: BatchProvider) -> None:
        """Take batches of all hooks from the provider, which the store fills."""
        self.provider = provider
        self._store = store
        self._views: dict[str, list[HookBatches]] = {}

    def view(self, hook_name: str) -> HookBatches:
        """One SAE's batches."""
        view = HookBatches()
        self._views.setdefault(hook_name, []).append(view)
        return view

    def __next__(self) -> dict[str, Tensor]:
        """The next batch's activations, for each hook; the views' `modality` is that of this batch."""
        return {name: batch.activations for name, batch in self._take().items()}

    def _take(self) -> dict[str, LabelledBatch]:
        activations = next(self.provider)
        packed = LabelledBatch(activations, self.provider.modality)
        batches = {name: self._store.split(packed, name) for name in self._views}
        for name, views in self._views.items():
            for view in views:
                view.modality = batches[name].modality
        return batches

    def serve(self, count: int) -> None:
        """Put so many further batches aside, for every view to hand out by itself."""
        for _ in range(count):
            for name, batch in self._take().items():
                for view in self._views[name]:
                    view.aside.append(batch)


class HookBatches(BatchProvider):
    """One SAE's part of shared batches: those that were put aside for it."""

    def __init__(self) -> None:
        """Begin with nothing put aside."""
        super().__init__(iter(()))
        self.aside: list[LabelledBatch] = []

    def __next__(self) -> Tensor:
        """The next batch that was put aside."""
        batch = self.aside.pop(0)
        self.modality = batch.modality
        return batch.activations

    def paused(self) -> AbstractContextManager[None]:
        """Nothing: who coordinates the trainers pauses for all of them."""
        return nullcontext()


class MultimodalMultiSAETrainer(MultiSAETrainer):
    """SAE-Lens's coordinator, with this package's trainer for each SAE."""

    trainers: dict[str, MultimodalSAETrainer]
    data_provider: SharedBatches
    checkpoint_thresholds: list[int]

    def __init__(
        self,
        cfg: SAETrainerConfig,
        saes: dict[str, TrainingSAE[Any]],
        hook_names: dict[str, str],
        data_provider: SharedBatches,
        evaluator: MultiSAEEvaluatorProtocol | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        *,
        progress: bool = True,
        balanced_threshold: bool = True,
    ) -> None:
        """See SAE-Lens, and `MultimodalSAETrainer`."""
        super().__init__(cfg, saes, hook_names, data_provider, evaluator, save_checkpoint_fn)
        self.progress = progress
        self.stop_requested = False
        own = replace(cfg, n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False)
        self.trainers = {
            name: MultimodalSAETrainer(
                own,
                sae,
                data_provider.view(hook_names[name]),
                progress=False,
                balanced_threshold=balanced_threshold,
            )
            for name, sae in saes.items()
        }
        self._random_state: dict[str, Any] | None = None

    def request_stop(self) -> None:
        """Stop before the next step."""
        self.stop_requested = True

    @property
    def is_finished(self) -> bool:
        """Whether the weights are final."""
        return all(trainer.is_finished for trainer in self.trainers.values())

    def fit(self) -> dict[str, TrainingSAE[Any]]:
        """Train all SAEs to the end.

        Raises:
            InterruptedException: `stop_requested` was set.
        """
        for sae in self.saes.values():
            sae.to(self.cfg.device)
        if self.is_finished:
            return self.saes
        self._estimate_scaling_factors()
        with tqdm(
            total=self.cfg.total_training_samples,
            initial=self.n_training_samples,
            desc=f"Training {len(self.saes)} SAEs",
            unit="tok",
            unit_scale=True,
            disable=not self.progress,
        ) as bar:
            while self.n_training_samples < self.cfg.total_training_samples:
                if self.stop_requested:
                    raise InterruptedException
                self._train_one_batch()
                bar.update(self.cfg.train_batch_size_samples)
        self._maybe_log_sparsity(final=True)
        self._finish()
        if self.cfg.save_final_checkpoint:
            self.save_checkpoint(checkpoint_name=f"final_{self.n_training_samples}")
        return self.saes

    def _train_one_batch(self) -> None:
        self._maybe_log_sparsity()
        batch = next(self.data_provider)
        outputs: dict[str, TrainStepOutput] = {}
        for name, trainer in self.trainers.items():
            outputs[name] = trainer.step(batch[self.hook_names[name]])
            trainer.log_locally(outputs[name])
        self.n_training_samples = max(trainer.n_training_samples for trainer in self.trainers.values())
        if self.cfg.logger.log_to_wandb:
            self._log_train_step(outputs)
        self._run_and_log_evals()
        for trainer in self.trainers.values():
            trainer.n_training_steps += 1
        self.n_training_steps += 1
        self._checkpoint_if_needed()

    @torch.no_grad()
    def _run_and_log_evals(self) -> None:
        """Evaluate all SAEs on held-out prompts every `eval_every_n_wandb_logs` logged steps, wherever it is logged."""
        every = self.cfg.logger.wandb_log_frequency * self.cfg.logger.eval_every_n_wandb_logs
        if self.evaluator is None or (self.n_training_steps + 1) % every:
            return
        logging_locally = any(trainer.log is not None for trainer in self.trainers.values())
        if not logging_locally and not self.cfg.logger.log_to_wandb:
            return
        for sae in self.saes.values():
            sae.eval()
        scalers = {name: trainer.activation_scaler for name, trainer in self.trainers.items()}
        found = self.evaluator(self.saes, self.data_provider, scalers, self.hook_names)
        for name, trainer in self.trainers.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in found.items() if key.startswith(f"{name}/")}
            trainer.log_numbers(own)
        if self.cfg.logger.log_to_wandb:
            import wandb

            wandb.log(found, step=self.n_training_steps)
        for sae in self.saes.values():
            sae.train()

    def _finish(self) -> None:
        self.data_provider.serve(max(trainer.n_batches_to_finish for trainer in self.trainers.values()))
        for trainer in self.trainers.values():
            trainer.finish()
            trainer.set_final_sae_metadata()
            trainer.is_finished = True

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint_name: str, wandb_aliases: list[str] | None = None) -> None:
        """Save a checkpoint of all SAEs, whole or not at all.

        Raises:
            StoreError: it cannot be written; earlier checkpoints are as they were.
        """
        if self.cfg.checkpoint_path is None:
            return
        provider = self.data_provider.provider
        with provider.paused(), whole_folder(Path(self.cfg.checkpoint_path) / checkpoint_name) as folder:
            for name, trainer in self.trainers.items():
                trainer.save_checkpoint(checkpoint_name=name, base_path=folder, wandb_aliases=wandb_aliases)
            save_tree(
                folder / _STATE_NAME,
                {
                    "random": random_state(),
                    "waiting": [tuple(batch) for batch in provider.waiting()],
                },
            )
            if self.save_checkpoint_fn is not None:
                self.save_checkpoint_fn(checkpoint_path=folder)

    def load_checkpoint(self, path: str | Path) -> None:
        """Be where `save_checkpoint` was.

        Raises:
            StoreError: the state is missing or damaged.
        """
        folder = Path(path)
        state = load_tree(folder / _STATE_NAME)
        for name, trainer in self.trainers.items():
            self.saes[name].load_weights_from_checkpoint(folder / name)
            trainer.load_trainer_state(folder / name)
        first = next(iter(self.trainers.values()))
        self.n_training_steps, self.n_training_samples = first.n_training_steps, first.n_training_samples
        self.checkpoint_thresholds = [at for at in self.checkpoint_thresholds if at >= self.n_training_samples]
        self.data_provider.provider.restore([LabelledBatch(*batch) for batch in state["waiting"]])
        self._random_state = state["random"]

    def restore_randomness(self) -> None:
        """Put all generators where the checkpoint was, if one was loaded."""
        if self._random_state is not None:
            restore_random_state(self._random_state)
