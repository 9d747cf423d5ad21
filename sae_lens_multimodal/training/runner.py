"""One training run, from the settings to a saved SAE."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training._interruption import InterruptedException
from sae_lens.util import temporary_seed

from sae_lens_multimodal.adapters.model import VisionLanguageModel, check_device, load_model
from sae_lens_multimodal.data.mixture import Mixture
from sae_lens_multimodal.data.sources import Rows
from sae_lens_multimodal.errors import ConfigError, DatasetError, SAEMismatchError, StoreError
from sae_lens_multimodal.hooks.saes import inference_sae, same_model
from sae_lens_multimodal.training.cached_store import CachedActivationsStore
from sae_lens_multimodal.training.checkpoint import LATEST, check_whole, latest_checkpoint, remove_leftovers
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig
from sae_lens_multimodal.training.distributed import (
    DistributedSAETrainer,
    config_of_process,
    join_processes,
    own_rows,
    store_config,
)
from sae_lens_multimodal.training.evaluator import MultimodalSAEEvaluator
from sae_lens_multimodal.training.interrupts import stop_on_signals
from sae_lens_multimodal.training.log import TrainingLog, flat_numbers
from sae_lens_multimodal.training.metrics import as_report
from sae_lens_multimodal.training.output import (
    METADATA_KEY,
    check_output_folder,
    is_finished,
    provenance,
    read_checkpoint_state,
    save_sae,
    write_checkpoint_state,
)
from sae_lens_multimodal.training.prompts import open_source
from sae_lens_multimodal.training.randomness import seeded
from sae_lens_multimodal.training.sae_config import UNSET_WIDTH
from sae_lens_multimodal.training.store import MultimodalActivationsStore
from sae_lens_multimodal.training.trainer import BatchProvider, MultimodalSAETrainer

logger = logging.getLogger(__name__)

_STARVED = 0.2
"""Below this share of the other modality's L0, a modality is worth a warning."""


class MultimodalSAETrainingRunner(LanguageModelSAETrainingRunner):
    """Trains an SAE on image and text tokens of a vision-language model.

    Use it as SAE-Lens's runner: `MultimodalSAETrainingRunner(cfg).run()`.
    """

    cfg: MultimodalSAERunnerConfig[Any]
    model: Any
    activations_store: MultimodalActivationsStore
    evaluator: Any
    metrics: dict[str, dict[str, Any]]
    """Of each modality, once `run` is through: see `evaluate_reconstruction`."""
    losses: dict[str, dict[str, Any]]
    """By where the reconstruction is spliced in, once `run` is through: see `splice_losses`."""

    def __init__(
        self,
        cfg: MultimodalSAERunnerConfig[Any],
        override_dataset: Rows | Mixture | None = None,
        override_model: VisionLanguageModel | None = None,
        override_sae: TrainingSAE[Any] | None = None,
    ) -> None:
        """Open dataset and model, and check that everything fits together, before anything long begins.

        Args:
            cfg: the settings; they are not changed.
            override_dataset: a dataset, list of rows or mixture in place of `dataset_path`.
            override_model: a loaded model in place of `model_name`; its own name is the one that is recorded.
            override_sae: an SAE to go on training.

        Raises:
            ConfigError: settings that cannot work.
            StoreError: `output_path` holds another run.
            DatasetError: the dataset cannot be read.
            ModelLoadError: the model cannot be loaded, or this machine lacks the device.
            UnknownHookError: the model has no such hook.
            SAEMismatchError: the SAE does not fit the hook.
        """
        self.processes = join_processes()
        self._result_path = cfg.output_path
        cfg = config_of_process(cfg, self.processes)
        check_output_folder(cfg.output_path, overwrite=cfg.overwrite, cfg=cfg)
        for device in (cfg.device, cfg.act_store_device):
            check_device(device or cfg.device)
        if cfg.use_cached_activations:
            self.activations_store = CachedActivationsStore.open(cfg)
            self.model, self.cfg = override_model, self.activations_store.cfg
        else:
            source = open_source(cfg, override_dataset)
            self.model = override_model if override_model is not None else load_run_model(cfg)
            self.cfg = fitted_config(cfg, self.model)
            part = store_config(self.cfg, self.processes)
            self.activations_store = MultimodalActivationsStore(self.model, part, own_rows(source, self.processes))
        self.sae = self._build_sae(override_sae)
        self.evaluator = MultimodalSAEEvaluator(self.activations_store)
        self.metrics = {}
        self.losses = {}
        self._tokens_seen: Counter[str] = Counter()

    def run(self) -> SAE[Any]:
        """Train, evaluate and save.

        Returns:
            The SAE as it is saved: what `SAE.load_from_disk(cfg.output_path)` gives.

        Raises:
            KeyboardInterrupt: the run was stopped by a signal; the message says where its checkpoint is.
            DatasetError: the dataset has vanished or lacks what is asked for.
            StoreError: the disk is full; earlier checkpoints are as they were.
        """
        if self.processes.told_by_first(is_finished(self.cfg)):
            logger.info("this run is finished; its SAE is in %s", self._result_path)
            return SAE.load_from_disk(str(self._result_path), device=self.cfg.device)
        self._set_sae_metadata()
        if self.cfg.logger.log_to_wandb:
            self._begin_logging()
        provider = BatchProvider(self.activations_store.labelled_batches(), prefetch=int(self.cfg.prefetch_llm_batches))
        try:
            trainer = self._build_trainer(provider)
            self._compile_sae_if_needed()
            sae = self.run_trainer_with_interruption_handling(trainer)
        finally:
            provider.close()
            self.activations_store.finish_reading()
        if not self.processes.is_first:
            return inference_sae(sae, copy=True)
        self._tokens_seen = trainer.tokens_seen
        self._evaluate(sae)
        self._log_result(trainer)
        if self.cfg.output_path is not None:
            self.save_final_sae(sae, self.cfg.output_path, trainer.log_feature_sparsity)
        if self.cfg.logger.log_to_wandb:
            self._finish_logging()
        return inference_sae(sae, copy=True)

    def run_trainer_with_interruption_handling(self, trainer: MultimodalSAETrainer) -> TrainingSAE[Any]:
        """Train; at a signal, save a checkpoint and stop.

        Raises:
            KeyboardInterrupt: a signal came.
        """
        try:
            with stop_on_signals(trainer.request_stop), seeded(self.cfg.seed):
                trainer.restore_randomness()
                return trainer.fit()
        except (KeyboardInterrupt, InterruptedException) as error:
            done = f"stopped after {trainer.n_training_samples} tokens"
            if self.cfg.checkpoint_path is None:
                raise KeyboardInterrupt(f"{done}; nothing is saved, as checkpoint_path is not set.") from error
            if isinstance(error, InterruptedException):
                # At once, as after a second signal, a step may be half done: then the last checkpoint has to serve.
                trainer.save_checkpoint(checkpoint_name=str(trainer.n_training_samples))
            next_step = self._how_to_go_on() or "no checkpoint was written yet"
            logger.warning("%s; %s", done, next_step)
            raise KeyboardInterrupt(f"{done}; {next_step}") from error
        except (DatasetError, StoreError) as error:
            advice = self._how_to_go_on()
            if advice is None:
                raise
            raise type(error)(f"{error} Stopped after {trainer.n_training_samples} tokens; {advice}.") from error

    def _how_to_go_on(self) -> str | None:
        folder = latest_checkpoint(self.cfg.checkpoint_path)
        if folder is None:
            return None
        if self.cfg.resume_from_checkpoint == LATEST:
            return f"the same command goes on from {folder}"
        return f"go on with resume_from_checkpoint={folder}"

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Write the store's place in the dataset and the settings beside what the trainer has written."""
        if checkpoint_path is None:
            return
        checkpoint_path.mkdir(parents=True, exist_ok=True)
        self.activations_store.save_to_checkpoint(checkpoint_path)
        store = self.activations_store
        write_checkpoint_state(
            checkpoint_path, self.cfg, self._tokens_seen, store.counts(), store.n_rows, self.processes.count
        )

    def save_final_sae(
        self, sae: TrainingSAE[Any], output_path: str, log_feature_sparsity: torch.Tensor | None = None
    ) -> None:
        """Save the SAE as a plain SAE-Lens SAE, with where it comes from in its metadata."""
        sae.cfg.metadata[METADATA_KEY] = provenance(
            self.cfg, self.activations_store, tokens_seen=self._tokens_seen, metrics=self.metrics
        )
        sae.cfg.metadata[METADATA_KEY]["losses"] = self.losses
        weights, config, sparsity = save_sae(sae, Path(output_path), self.cfg, log_feature_sparsity)
        if self.cfg.logger.log_to_wandb:
            self.cfg.logger.log(self, weights, config, sparsity_path=sparsity, wandb_aliases=["final_model"])

    # ---- parts of a run ----------------------------------------------------------------------------------------------

    def _build_sae(self, given: TrainingSAE[Any] | None) -> TrainingSAE[Any]:
        if given is None and self.cfg.from_pretrained_path is not None:
            given = TrainingSAE.load_from_disk(self.cfg.from_pretrained_path, self.cfg.device)
        if given is not None:
            _check_same_kind(given, self.cfg)
            return given.to(self.cfg.device)
        try:
            with temporary_seed(self.cfg.seed):
                sae: TrainingSAE[Any] = TrainingSAE.from_dict(self.cfg.get_training_sae_cfg_dict())
        except ValueError as error:
            raise ConfigError(f"sae: {error}") from error
        return sae.to(self.cfg.device)

    def _build_trainer(self, provider: BatchProvider) -> MultimodalSAETrainer:
        kind: Callable[..., MultimodalSAETrainer] = MultimodalSAETrainer
        if self.processes.count > 1:
            kind = partial(DistributedSAETrainer, processes=self.processes)
        trainer = kind(
            sae=self.sae,
            data_provider=provider,
            evaluator=self.evaluator if self.cfg.n_eval_batches else None,
            save_checkpoint_fn=self.save_checkpoint,
            cfg=self.cfg.to_sae_trainer_config(),
            progress=self.cfg.progress,
            balanced_threshold=self.cfg.balanced_threshold,
        )
        self._tokens_seen = trainer.tokens_seen
        folder = self._checkpoint_to_resume()
        if folder is not None:
            own = self.processes.own_folder(folder)
            state = read_checkpoint_state(own, self.cfg, self.activations_store.n_rows, self.processes.count)
            trainer.tokens_seen.update(state["tokens_seen"])
            self.sae.load_weights_from_checkpoint(folder)
            trainer.load_trainer_state(folder)
            self.activations_store.load_from_checkpoint(own)
            self.activations_store.restore_counts(state["counts"])
            logger.warning("going on after %d tokens from %s", trainer.n_training_samples, folder)
        trainer.log = self.open_log(trainer.n_training_steps)
        return trainer

    def _checkpoint_to_resume(self) -> Path | None:
        given = self.cfg.resume_from_checkpoint
        if given is None:
            return None
        if given == LATEST:
            assert self.cfg.checkpoint_path is not None
            remove_leftovers(Path(self.cfg.checkpoint_path))
            return latest_checkpoint(self.cfg.checkpoint_path)
        if (Path(given) / RUNNER_CFG_FILENAME).is_file():
            check_whole(Path(given))
        return Path(given)

    def _evaluate(self, sae: TrainingSAE[Any]) -> None:
        if not self.cfg.n_eval_batches:
            return
        plain = inference_sae(sae)
        totals = self.evaluator.totals(plain)
        self.metrics = as_report({name: total.metrics() for name, total in totals.items()})
        has_prompts = not self.cfg.use_cached_activations
        if self.cfg.eval_losses and has_prompts and self.model.hooks.resolve(self.cfg.hook_name).tower == "language":
            self.losses = self.evaluator.losses(plain, totals)
        for name, values in self.metrics.items():
            logger.info("%s tokens: %s", name, values)
        fired = {name: values["l0"] for name, values in self.metrics.items() if values["l0"] is not None}
        if len(fired) > 1 and min(fired.values()) < _STARVED * max(fired.values()):
            logger.warning(
                "the saved SAE lets %s features fire on a token of %s, but %s on one of %s; other token_shares or an "
                "architecture without one threshold for all tokens, such as topk, balance them",
                *_least_and_most(fired),
            )

    def open_log(self, after_step: int) -> TrainingLog | None:
        """The local log beside `output_path`, which goes on after the steps that are done; None without a path."""
        return TrainingLog(self.cfg.output_path, after_step=after_step) if self.cfg.output_path is not None else None

    def final_numbers(self) -> dict[str, float | int]:
        """The final evaluation as it is logged; empty where there was none."""
        return flat_numbers({"final": {**self.metrics, "losses": self.losses}})

    def _log_result(self, trainer: MultimodalSAETrainer) -> None:
        """Log the final evaluation, and draw what was logged."""
        if found := self.final_numbers():
            trainer.record(found)
        if trainer.log is not None:
            logger.info("what was logged is drawn in %s", trainer.log.plot())

    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        # SAE-Lens warns about these at loading, with advice that is about its own models; they are recorded with
        # the rest of what this package knows.
        self.sae.cfg.metadata.model_from_pretrained_kwargs = {}

    def _begin_logging(self) -> None:
        import wandb

        wandb.init(
            project=self.cfg.logger.wandb_project,
            entity=self.cfg.logger.wandb_entity,
            config=self.cfg.to_dict(),
            name=self.cfg.logger.run_name,
            id=self.cfg.logger.wandb_id,
        )

    def _finish_logging(self) -> None:
        import wandb

        wandb.finish()


def load_run_model(cfg: MultimodalSAERunnerConfig[Any]) -> VisionLanguageModel:
    """Load the model that a run's settings name.

    Raises:
        ConfigError: they name none.
        ModelLoadError: it cannot be loaded.
    """
    if not cfg.model_name:
        raise ConfigError("model_name is empty; give a hub name or a folder, or pass override_model.")
    settings = dict(cfg.model_from_pretrained_kwargs or {})
    if "device_map" not in settings:
        settings.setdefault("device", cfg.llm_device)
    return load_model(cfg.model_name, **settings)


def fitted_config(cfg: MultimodalSAERunnerConfig[Any], model: VisionLanguageModel) -> MultimodalSAERunnerConfig[Any]:
    """A copy of the settings with the hook's own name and width, and the model's name."""
    if not cfg.hook_name:
        raise ConfigError("hook_name is empty; give one such as 'blocks.2.hook_resid_post'.")
    hook = model.hooks.resolve(cfg.hook_name)
    if hook.tower != "language" and (cfg.token_shares or {}).get("text"):
        raise ConfigError(
            f"{hook.name} is in the {hook.tower} tower, whose positions are patches of pictures, but token_shares asks "
            "for text; leave token_shares out, or choose a hook of the language model."
        )
    width = cfg.sae.d_in
    if width == UNSET_WIDTH:
        if hook.d is None:
            raise ConfigError(f"The width of {hook.name} is not known; give sae.d_in.")
        width = hook.d
    if hook.d is not None and width != hook.d:
        raise SAEMismatchError(
            f"sae.d_in is {width}, but {hook.name} of {model.name} is {hook.d} wide; set sae.d_in to {hook.d} or "
            "choose another hook."
        )
    fitted = copy.copy(cfg)
    fitted.sae = replace(cfg.sae, d_in=width, metadata=copy.deepcopy(cfg.sae.metadata))
    fitted.hook_name = hook.name
    if not (cfg.model_name and same_model(cfg.model_name, model.name)):
        # Of a model that was given: the SAE must say what it was really trained on.
        fitted.model_name = model.name
    return fitted


def _check_same_kind(sae: TrainingSAE[Any], cfg: MultimodalSAERunnerConfig[Any]) -> None:
    """Refuse to go on training an SAE that is of another kind, width or place than the settings say."""
    metadata = sae.cfg.metadata
    differences = {
        "architecture": (sae.cfg.architecture(), cfg.sae.architecture()),
        "d_in": (sae.cfg.d_in, cfg.sae.d_in),
        "d_sae": (sae.cfg.d_sae, cfg.sae.d_sae),
        "hook_name": (metadata.hook_name or cfg.hook_name, cfg.hook_name),
        "model_name": (metadata.model_name or cfg.model_name, cfg.model_name),
    }
    for name, (has, wanted) in differences.items():
        if has != wanted and not (name == "model_name" and same_model(has, wanted)):
            raise SAEMismatchError(
                f"The SAE to go on training has {name} {has!r}, the settings say {wanted!r}; give a matching SAE or "
                "change the settings."
            )


def _least_and_most(values: dict[str, float]) -> tuple[str, str, str, str]:
    least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return f"{values[least]:.1f}", least, f"{values[most]:.1f}", most
