"""One run that trains several SAEs of one model from one forward pass, each saved as if it had been trained alone."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.data.mixture import Mixture
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.files import write_json
from sae_lens_multimodal.hooks.saes import inference_sae
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig
from sae_lens_multimodal.training.distributed import join_processes
from sae_lens_multimodal.training.output import is_finished, read_checkpoint_state, write_checkpoint_state
from sae_lens_multimodal.training.runner import MultimodalSAETrainingRunner, load_run_model
from sae_lens_multimodal.training.several_config import MultimodalMultiSAERunnerConfig
from sae_lens_multimodal.training.several_store import SeveralHooksStore
from sae_lens_multimodal.training.several_trainer import MultimodalMultiSAETrainer, SharedBatches
from sae_lens_multimodal.training.trainer import BatchProvider

logger = logging.getLogger(__name__)


class MultimodalMultiSAETrainingRunner:
    """Trains several SAEs at once: `MultimodalMultiSAETrainingRunner(cfg).run()`.

    Each SAE starts from the weights and sees the tokens that it would alone, and is evaluated and saved in the same
    way. Three things couple them: with `max_norm_ratio` a token goes that is an outlier at any of the hooks; where one
    SAE's normalisation has to be estimated, the batches for it pass by the others too; and where hooks of the language
    model stand beside hooks of the vision tower, prompts are read until there are enough tokens for both.
    """

    metrics: dict[str, dict[str, dict[str, Any]]]
    """For each SAE, once `run` is through, what `MultimodalSAETrainingRunner.metrics` says of one."""

    def __init__(
        self,
        cfg: MultimodalMultiSAERunnerConfig,
        override_dataset: Rows | Mixture | None = None,
        override_model: VisionLanguageModel | None = None,
    ) -> None:
        """Open dataset and model, and check that everything fits together, before anything long begins.

        Raises:
            ConfigError: settings that cannot work.
            StoreError: a folder below `output_path` holds another run.
            DatasetError: the dataset cannot be read.
            ModelLoadError: the model cannot be loaded, or this machine lacks the device.
            UnknownHookError: the model has no such hook.
            SAEMismatchError: an SAE does not fit its hook.
        """
        if cfg.shared.use_cached_activations:
            raise ConfigError("use_cached_activations holds the activations of one hook; train each of saes by itself.")
        if (processes := join_processes()).count > 1:
            raise ConfigError(f"saes cannot be trained by {processes.count} processes at once; start one, or one SAE.")
        self.cfg = cfg
        model = override_model if override_model is not None else load_run_model(cfg.shared)
        self.parts = {
            name: MultimodalSAETrainingRunner(_for_its_tower(part, model), override_dataset, model)
            for name, part in cfg.parts.items()
        }
        self.metrics = {}
        self._trainer: MultimodalMultiSAETrainer | None = None
        source = self._first.activations_store.source
        widths = {part.cfg.hook_name: part.cfg.sae.d_in for part in self.parts.values()}
        shared = next((part.cfg for part in self.parts.values() if part.cfg.token_shares), self._first.cfg)
        self.activations_store = SeveralHooksStore(model, shared, source, widths)

    @property
    def saes(self) -> dict[str, TrainingSAE[Any]]:
        """The SAEs in training, by name."""
        return {name: part.sae for name, part in self.parts.items()}

    @property
    def _first(self) -> MultimodalSAETrainingRunner:
        return next(iter(self.parts.values()))

    def run(self) -> dict[str, SAE[Any]]:
        """Train, evaluate and save.

        Returns:
            The SAEs as they are saved, by name.

        Raises:
            KeyboardInterrupt: the run was stopped by a signal; the message says where its checkpoint is.
        """
        if all(is_finished(part.cfg) for part in self.parts.values()):
            logger.info("this run is finished; its SAEs are in %s", self.cfg.output_path)
            return {name: part.run() for name, part in self.parts.items()}
        first = self._first
        for part in self.parts.values():
            part._set_sae_metadata()
        if first.cfg.logger.log_to_wandb:
            first._begin_logging()
        provider = BatchProvider(
            self.activations_store.labelled_batches(), prefetch=int(first.cfg.prefetch_llm_batches)
        )
        try:
            trainer = self._trainer = self._build_trainer(provider)
            for part in self.parts.values():
                part._compile_sae_if_needed()
            first.run_trainer_with_interruption_handling(trainer)
        finally:
            provider.close()
            self.activations_store.finish_reading()
        saved = {name: self._save(name, trainer) for name in self.parts}
        if first.cfg.logger.log_to_wandb:
            first._finish_logging()
        return saved

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Write the store's place in the dataset and the settings beside what the trainer has written."""
        if checkpoint_path is None or self._trainer is None:
            return
        store = self.activations_store
        store.save_to_checkpoint(checkpoint_path)
        write_json(checkpoint_path / RUNNER_CFG_FILENAME, self.cfg.to_dict())
        for name, part in self.parts.items():
            seen = self._trainer.trainers[name].tokens_seen
            write_checkpoint_state(checkpoint_path / name, part.cfg, seen, store.counts(), store.n_rows)

    def evaluate(
        self,
        saes: dict[str, TrainingSAE[Any]],
        data_provider: SharedBatches,
        activation_scalers: dict[str, ActivationScaler],
        hook_names: dict[str, str],
    ) -> dict[str, Any]:
        """The metrics of all SAEs by name, as SAE-Lens logs them during training."""
        logged = {}
        for name, sae in saes.items():
            metrics = self.parts[name].evaluator(sae, data_provider.provider, activation_scalers[name])
            logged.update({f"{name}/{metric}": value for metric, value in metrics.items()})
        return logged

    def _build_trainer(self, provider: BatchProvider) -> MultimodalMultiSAETrainer:
        first = self._first.cfg
        trainer = MultimodalMultiSAETrainer(
            cfg=first.to_sae_trainer_config(),
            saes=self.saes,
            hook_names={name: part.cfg.hook_name for name, part in self.parts.items()},
            data_provider=SharedBatches(self.activations_store, provider),
            evaluator=self.evaluate if first.n_eval_batches else None,
            save_checkpoint_fn=self.save_checkpoint,
            progress=first.progress,
            balanced_threshold=first.balanced_threshold,
        )
        folder = self._first._checkpoint_to_resume()
        if folder is not None:
            self._resume(trainer, folder)
        for name, part in self.parts.items():
            trainer.trainers[name].log = part.open_log(trainer.trainers[name].n_training_steps)
        return trainer

    def _resume(self, trainer: MultimodalMultiSAETrainer, folder: Path) -> None:
        store = self.activations_store
        state: dict[str, Any] = {}
        for name, part in self.parts.items():
            state = read_checkpoint_state(folder / name, part.cfg, store.n_rows)
            trainer.trainers[name].tokens_seen.update(state["tokens_seen"])
        trainer.load_checkpoint(folder)
        store.load_from_checkpoint(folder)
        store.restore_counts(state["counts"])
        logger.warning("going on after %d tokens from %s", trainer.n_training_samples, folder)

    def _save(self, name: str, trainer: MultimodalMultiSAETrainer) -> SAE[Any]:
        part, own = self.parts[name], trainer.trainers[name]
        part._tokens_seen = own.tokens_seen
        part._evaluate(part.sae)
        self.metrics[name] = part.metrics
        if own.log is not None:
            own.log_numbers(part.final_numbers())
            own.log.plot()
        # What was read and dropped is counted where it was read.
        part.activations_store = self.activations_store
        if part.cfg.output_path is not None:
            part.save_final_sae(part.sae, part.cfg.output_path, own.log_feature_sparsity)
        return inference_sae(part.sae, copy=True)


def _for_its_tower(cfg: MultimodalSAERunnerConfig[Any], model: VisionLanguageModel) -> MultimodalSAERunnerConfig[Any]:
    """Shares of modalities mean nothing for patches of pictures, which are beside tokens of prompts in the same run."""
    if not cfg.hook_name or model.hooks.resolve(cfg.hook_name).tower == "language":
        return cfg
    fitted = copy.copy(cfg)
    fitted.token_shares = None
    return fitted
