"""Where a run's SAE is saved, and what is written down about how it came to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import TrainingSAE
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_multimodal.data.mixture import Mixture
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.files import (
    MANIFEST_NAME,
    package_versions,
    read_manifest,
    write_atomically,
    write_json,
    write_manifest,
    write_text,
)
from sae_lens_multimodal.training.card import model_card
from sae_lens_multimodal.training.checkpoint import LATEST, one_line
from sae_lens_multimodal.training.config import MultimodalSAERunnerConfig
from sae_lens_multimodal.training.store import MultimodalActivationsStore

KIND = "sae"
SCHEMA_VERSION = 1
METADATA_KEY = "sae_lens_multimodal"
"""The key of the SAE's metadata under which this package writes."""
CARD_NAME = "README.md"
STATE_NAME = "multimodal_state.json"
"""What a checkpoint holds besides SAE-Lens's files."""


_FILE_NAMES = (SAE_WEIGHTS_FILENAME, SAE_CFG_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME, CARD_NAME)


def check_output_folder(
    path: str | None, *, overwrite: bool, cfg: MultimodalSAERunnerConfig[Any] | None = None
) -> None:
    """Refuse a folder that holds something already, unless it is of a run that `cfg` goes on with.

    Raises:
        StoreError: it does, and `overwrite` is not set; or the path is a file.
    """
    if path is None or (cfg is not None and cfg.resume_from_checkpoint == LATEST and _is_of_run(Path(path), cfg)):
        return
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"output_path {folder} is a file; give a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        holder = "an earlier run" if (folder / MANIFEST_NAME).is_file() else "other files"
        raise StoreError(
            f"output_path {folder} holds {holder}; give another folder, or set overwrite to replace its files."
        )


def is_finished(cfg: MultimodalSAERunnerConfig[Any]) -> bool:
    """Whether `output_path` holds the whole result of this very run, which was started again."""
    if cfg.output_path is None or cfg.resume_from_checkpoint != LATEST:
        return False
    return (Path(cfg.output_path) / MANIFEST_NAME).is_file() and _is_of_run(Path(cfg.output_path), cfg)


def _is_of_run(folder: Path, cfg: MultimodalSAERunnerConfig[Any]) -> bool:
    """Whether a folder was written by this run, wholly or, where it was killed while it saved, in part."""
    if not folder.is_dir():
        return False
    if (folder / MANIFEST_NAME).is_file():
        settings = read_manifest(folder, kind=KIND, schema_version=SCHEMA_VERSION)["settings"]
        return settings.get("checkpoint_path") == cfg.checkpoint_path
    return all(child.name.removeprefix(".").startswith(_FILE_NAMES) for child in folder.iterdir())


def provenance(
    cfg: MultimodalSAERunnerConfig[Any],
    store: MultimodalActivationsStore,
    *,
    tokens_seen: Mapping[str, int],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """What goes into the saved SAE's metadata: JSON values only."""
    return {
        "versions": package_versions(),
        "dataset_path": cfg.dataset_path or describe_dataset(store.source.training_rows),
        "dataset_subset": cfg.dataset_subset,
        "dataset_mixture": cfg.dataset_mixture,
        "split": cfg.split,
        "seed": cfg.seed,
        "token_shares": cfg.token_shares,
        "image_tokens": cfg.image_tokens,
        "newline_tokens": cfg.newline_tokens,
        "model_from_pretrained_kwargs": cfg.to_dict()["model_from_pretrained_kwargs"],
        "tokens_seen": dict(tokens_seen),
        "tokens_read": dict(store.tokens_read),
        "tokens_dropped": store.tokens_dropped,
        "max_norm_ratio": cfg.max_norm_ratio,
        "tokens_outlying": dict(store.outliers),
        "rows_read": store.n_dataset_processed,
        "epochs_finished": store.epoch,
        "rows_skipped": dict(store.all_skipped),
        "rows": store.row_report.to_dict(),
        "too_long": cfg.too_long,
        "evaluated_on": "held-out prompts" if store.source.n_held_out else "training prompts",
        "metrics": dict(metrics),
    }


def describe_dataset(rows: object) -> str:
    """Words for a dataset without a path: a mixture's members, or what was given in memory."""
    if isinstance(rows, Mixture):
        return f"a mixture of {', '.join(member.name for member in rows.members)}"
    return f"given in memory as {type(rows).__name__}"


def save_sae(
    sae: TrainingSAE[Any], folder: Path, cfg: MultimodalSAERunnerConfig[Any], log_sparsity: Tensor | None
) -> tuple[Path, Path, Path | None]:
    """Save a plain SAE-Lens SAE; the manifest is written last and says that the folder is complete.

    Returns:
        The paths of weights, configuration and sparsity.
    """
    try:
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        weights, config = sae.save_inference_model(str(folder))
        sparsity = None
        if log_sparsity is not None and torch.isfinite(log_sparsity).all():
            sparsity = folder / SPARSITY_FILENAME
            write_atomically(sparsity, lambda path: save_file({"sparsity": log_sparsity}, path))
        write_json(folder / RUNNER_CFG_FILENAME, cfg.to_dict())
        write_text(folder / CARD_NAME, model_card(cfg.to_dict(), sae.cfg.metadata.get(METADATA_KEY) or {}))
        write_manifest(folder, kind=KIND, schema_version=SCHEMA_VERSION, settings=cfg.to_dict())
    except (OSError, SafetensorError) as error:
        raise StoreError(f"The SAE cannot be saved in {folder} ({one_line(error)}).") from error
    return Path(weights), Path(config), sparsity


def write_checkpoint_state(
    folder: Path,
    cfg: MultimodalSAERunnerConfig[Any],
    tokens_seen: Mapping[str, int],
    counts: Mapping[str, Any],
    n_rows: int | None = None,
    n_processes: int = 1,
) -> None:
    """Write what a checkpoint holds besides SAE-Lens's files."""
    write_json(folder / RUNNER_CFG_FILENAME, cfg.to_dict())
    state = {"tokens_seen": dict(tokens_seen), "counts": dict(counts), "n_rows": n_rows, "n_processes": n_processes}
    write_json(folder / STATE_NAME, state)


def read_checkpoint_state(
    folder: Path, cfg: MultimodalSAERunnerConfig[Any], n_rows: int | None = None, n_processes: int = 1
) -> dict[str, Any]:
    """Check that a checkpoint belongs to a run like this one, and read its `tokens_seen` and the store's `counts`.

    Raises:
        StoreError: there is no checkpoint, or it is of another model, hook or SAE.
    """
    for name in (RUNNER_CFG_FILENAME, STATE_NAME):
        if not (folder / name).is_file():
            raise StoreError(f"resume_from_checkpoint {folder} has no {name}; give a folder below checkpoint_path.")
    saved = json.loads((folder / RUNNER_CFG_FILENAME).read_text(encoding="utf-8"))
    for name in ("model_name", "hook_name"):
        if saved[name] != getattr(cfg, name):
            raise StoreError(f"{folder} was trained with {name}={saved[name]!r}, this run has {getattr(cfg, name)!r}.")
    own = cfg.sae.to_dict()
    for name in ("architecture", "d_in", "d_sae"):
        if saved["sae"][name] != own[name]:
            raise StoreError(
                f"{folder} was trained with sae.{name}={saved['sae'][name]!r}, this run has {own[name]!r}."
            )
    state: dict[str, Any] = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    missing = {"tokens_seen", "counts"} - set(state)
    if missing:
        raise StoreError(f"{folder / STATE_NAME} lacks {sorted(missing)}; give a checkpoint of this version.")
    if state.get("n_processes", 1) != n_processes:
        raise StoreError(
            f"{folder} was written by {state.get('n_processes', 1)} processes together, this run has {n_processes}; "
            "start as many, or begin anew with another checkpoint_path."
        )
    if state.get("n_rows") != n_rows:
        raise StoreError(
            f"{folder} was trained on a dataset of {state.get('n_rows')} rows, this run has {n_rows}; give the same "
            "dataset, or begin anew with another checkpoint_path."
        )
    return state
