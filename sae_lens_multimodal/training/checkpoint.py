"""Checkpoints from which a run goes on bit for bit: written whole or not at all, and found again by themselves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors import SafetensorError
from torch import Tensor

from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.files import MANIFEST_NAME, read_manifest, write_manifest
from sae_lens_multimodal.training.tree_file import copy_like, load_tree, save_tree

KIND = "checkpoint"
SCHEMA_VERSION = 1
TRAINER_STATE_NAME = "trainer_state.safetensors"
LATEST = "latest"
"""The value of `resume_from_checkpoint` that finds the last whole checkpoint by itself."""
FINAL_PREFIX = "final_"
_PARTIAL_PREFIX = ".partial-"
_ASIDE_PREFIX = ".old-"

_COUNTERS = ("n_training_samples", "n_training_steps", "n_frac_active_samples", "started_fine_tuning")
_TENSORS = ("act_freq_scores", "n_forward_passes_since_fired")

_NO_PART_OF_A_RUN = (
    "checkpoint_path",
    "resume_from_checkpoint",
    "output_path",
    "overwrite",
    "progress",
    "verbose",
    "logger",
    "n_checkpoints",
    "save_final_checkpoint",
    "prefetch_llm_batches",
    "n_data_workers",
    "sae_lens_version",
    "sae_lens_training_version",
)
"""Settings that may differ between two starts of one run: none of them changes the weights."""


def run_id(settings: Mapping[str, Any]) -> str:
    """A name for all runs with these settings: those that give the same weights."""
    own = {name: value for name, value in settings.items() if name not in _NO_PART_OF_A_RUN}
    own["sae"] = {name: value for name, value in own.get("sae", {}).items() if name != "metadata"}
    return hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:12]


# ---- folders ---------------------------------------------------------------------------------------------------------


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder elsewhere, and let it appear under its name in one step, with a manifest.

    Yields:
        An empty folder of the same name to fill.

    Raises:
        StoreError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    partial = folder.parent / f"{_PARTIAL_PREFIX}{folder.name}-{os.getpid()}"
    staged = partial / folder.name
    try:
        shutil.rmtree(partial, ignore_errors=True)
        staged.mkdir(parents=True)
        yield staged
        write_manifest(staged, kind=KIND, schema_version=SCHEMA_VERSION, settings={})
        _flush(staged)
        _put_in_place(staged, folder)
    except (OSError, SafetensorError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"The checkpoint {folder} cannot be written ({one_line(error)}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def one_line(error: BaseException) -> str:
    """What an error says, without line ends."""
    return " ".join(str(error).split())


def _flush(folder: Path) -> None:
    """Have the disk hold every file before the folder gets its name: a power cut must not leave empty files."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(staged: Path, folder: Path) -> None:
    aside = folder.parent / f"{_ASIDE_PREFIX}{folder.name}"
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    staged.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what writers that were killed left half done below a folder of checkpoints."""
    if folder.is_dir():
        for child in folder.iterdir():
            if child.name.startswith((_PARTIAL_PREFIX, _ASIDE_PREFIX)):
                shutil.rmtree(child, ignore_errors=True)


def latest_checkpoint(folder: str | Path | None) -> Path | None:
    """The whole checkpoint with the most tokens below a folder; None where there is none."""
    if folder is None or not Path(folder).is_dir():
        return None
    found = [(_tokens_of(child), child.name.startswith(FINAL_PREFIX), child) for child in Path(folder).iterdir()]
    whole = [entry for entry in found if entry[0] >= 0 and (entry[2] / MANIFEST_NAME).is_file()]
    return max(whole)[2] if whole else None


def _tokens_of(folder: Path) -> int:
    digits = folder.name.removeprefix(FINAL_PREFIX)
    return int(digits) if digits.isdecimal() else -1


def check_whole(folder: Path) -> None:
    """Check that a folder is a checkpoint of this version.

    Raises:
        StoreError: it is not.
    """
    read_manifest(folder, kind=KIND, schema_version=SCHEMA_VERSION)


# ---- the trainer's part ----------------------------------------------------------------------------------------------


def trainer_state(trainer: SAETrainer[Any, Any]) -> dict[str, Any]:
    """All that SAE-Lens's trainer and SAE hold and that later steps depend on."""
    return {
        "optimizer": trainer.optimizer.state_dict(),
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficients": {name: entry.state_dict() for name, entry in trainer.coefficient_schedulers.items()},
        "counters": {name: getattr(trainer, name) for name in _COUNTERS},
        "tensors": {name: getattr(trainer, name) for name in _TENSORS},
        "exact_weights": _lost_in_saving(trainer.sae),
    }


def restore_trainer_state(trainer: SAETrainer[Any, Any], state: Mapping[str, Any]) -> None:
    """Put a trainer where `trainer_state` found it; the weights themselves are read from SAE-Lens's own file before."""
    trainer.optimizer.load_state_dict(state["optimizer"])
    for parameter, entries in trainer.optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[name] = copy_like(value, parameter)
    trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    for name, entry in state["coefficients"].items():
        trainer.coefficient_schedulers[name].load_state_dict(entry)
    for name in _COUNTERS:
        setattr(trainer, name, state["counters"][name])
    for name in _TENSORS:
        setattr(trainer, name, copy_like(state["tensors"][name], getattr(trainer, name)))
    trainer.sae.load_state_dict(state["exact_weights"], strict=False)
    trainer.checkpoint_thresholds = [at for at in trainer.checkpoint_thresholds if at >= trainer.n_training_samples]


def _lost_in_saving(sae: TrainingSAE[Any]) -> dict[str, Tensor]:
    """Weights that SAE-Lens writes in another form, such as a threshold for its logarithm, with rounding."""
    exact = dict(sae.state_dict())
    saved = dict(exact)
    sae.process_state_dict_for_saving(saved)
    return {name: value for name, value in exact.items() if saved.get(name) is not value}


def save_trainer_tree(folder: Path, tree: Mapping[str, Any]) -> None:
    """Write a trainer's state into a checkpoint."""
    save_tree(folder / TRAINER_STATE_NAME, dict(tree))


def load_trainer_tree(folder: Path) -> dict[str, Any]:
    """Read a trainer's state from a checkpoint.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    tree: dict[str, Any] = load_tree(folder / TRAINER_STATE_NAME)
    return tree
