"""What is known about an SAE's training: its settings, which rows it saw, and which were held out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME

from sae_lens_multimodal.adapters.model import VisionLanguageModel, load_model
from sae_lens_multimodal.data.rows import Prompt, SkipReport
from sae_lens_multimodal.errors import ConfigError, SAEMismatchError
from sae_lens_multimodal.files import MANIFEST_NAME, read_json
from sae_lens_multimodal.hooks.load_sae import load_sae
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig
from sae_lens_multimodal.training.output import METADATA_KEY, describe_dataset
from sae_lens_multimodal.training.prompts import PromptSource, open_source
from sae_lens_multimodal.training.store import token_choice
from sae_lens_multimodal.training.tokens import TokenChoice

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """The dataset that an SAE was trained on, cut as the training cut it."""

    source: PromptSource
    name: str

    @property
    def description(self) -> str:
        """What the rows that are evaluated on are to the SAE."""
        return "held out of training" if self.source.n_held_out else "trained on: nothing was held out"

    def evaluation(self, count: int) -> Iterator[Prompt]:
        """At most `count` prompts that were held out, or of those trained on where none were."""
        if not self.source.n_held_out:
            logger.warning(
                "the run held no rows of %s out (n_eval_batches=0, or too small a dataset), so the SAE is evaluated "
                "on rows that it was trained on; give another dataset or split for honest numbers",
                self.name,
            )
        return self.source.evaluation(count)

    def training(self) -> Iterator[Prompt]:
        """The prompts of the first epoch."""
        return self.source.epoch(0, skip_rows=0, report=SkipReport())


@dataclass(frozen=True)
class TrainingRun:
    """An SAE and the settings it was trained with, as far as they are known."""

    sae: SAE[Any]
    config: MultimodalSAERunnerConfig[Any] | None

    @classmethod
    def of(cls, sae: TrainingRun | SAE[Any] | str | Path, device: str = "cpu") -> TrainingRun:
        """Read the folder of a run; an SAE by itself has no settings.

        Raises:
            StoreError: the folder holds no SAE.
        """
        if isinstance(sae, TrainingRun):
            return sae
        if not isinstance(sae, str | Path):
            return cls(sae, None)
        folder = Path(sae)
        return cls(load_sae(folder, device), _read_config(folder))

    @property
    def model_name(self) -> str:
        """The model that the SAE was trained on.

        Raises:
            SAEMismatchError: it does not say.
        """
        name = self.sae.cfg.metadata.model_name
        if not name:
            raise SAEMismatchError("The SAE's metadata names no model; give the model it was trained on.")
        return str(name)

    def load_model(
        self, name: str | None = None, *, device: str | None = None, dtype: str | None = None
    ) -> VisionLanguageModel:
        """Load the model that the SAE was trained on, as its training loaded it.

        Args:
            name: another hub name or folder of it.
            device: where to; None for the CPU, or for what the training's `device_map` said.
            dtype: the type of its weights; None for the training's, or the checkpoint's.
        """
        settings = dict((self.config.model_from_pretrained_kwargs if self.config else None) or {})
        settings.pop("device", None)
        if device is not None:
            settings.pop("device_map", None)
            settings["device"] = device
        if dtype is not None:
            settings["dtype"] = dtype
        return load_model(name or self.model_name, **settings)

    @property
    def choice(self) -> TokenChoice:
        """The tokens that the SAE was trained on; all image and text tokens where it does not say."""
        if self.config is not None:
            return token_choice(self.config)
        origin = self.sae.cfg.metadata[METADATA_KEY] or {}
        known = {name: origin[name] for name in ("image_tokens", "newline_tokens", "max_norm_ratio") if name in origin}
        return TokenChoice(**known)

    def held_out(self, dataset: object, *, split: str, subset: str | None) -> HeldOut | None:
        """The dataset as the training cut it, if `dataset` is the one trained on or None; else None."""
        config = self.config
        if config is None or not (config.dataset_path or config.dataset_mixture):
            return None
        if dataset is not None and not _is_same(dataset, split, subset, config):
            return None
        source = open_source(config)
        return HeldOut(source, config.dataset_path or describe_dataset(source.training_rows))


def _is_same(dataset: object, split: str, subset: str | None, config: MultimodalSAERunnerConfig[Any]) -> bool:
    if not isinstance(dataset, str | Path) or not config.dataset_path:
        return False
    one, other = str(dataset), str(config.dataset_path)
    same = one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())
    return same and split == config.split and subset == config.dataset_subset


def _read_config(folder: Path) -> MultimodalSAERunnerConfig[Any] | None:
    """The settings that lie beside the SAE, if this package wrote them."""
    path = folder / RUNNER_CFG_FILENAME
    if not path.is_file() or not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        return MultimodalSAERunnerConfig.from_dict(read_json(path))
    except ConfigError as error:
        logger.warning("%s cannot be used (%s); which rows the SAE was trained on is not known", path, error)
        return None
