"""Edits on disk: a small folder with the changes alone, or a whole checkpoint with the edit in it."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.edit import DenseChange, Edit, LayerChange, RankOneChange
from sae_lens_multimodal.editing.update import RankOne
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.files import read_manifest, write_atomically, write_manifest

KIND, SCHEMA_VERSION = "model edit", 1
TENSORS_NAME = "edit.safetensors"


def save_edit(edit: Edit, folder: str | PathLike[str]) -> Path:
    """Write an edit as a small folder: `edit.safetensors`, and `manifest.json` with what it applies to.

    Each file is written in one step; the manifest, which names the other's content, comes last.
    """
    folder = Path(folder)
    tensors = {
        f"{index}.{name}": tensor.cpu().contiguous()
        for index, change in enumerate(edit.changes)
        for name, tensor in change.tensors().items()
    }
    path = folder / TENSORS_NAME
    write_atomically(path, lambda temporary: save_file(tensors, temporary))
    changes = [
        {"kind": one.kind, "path": one.path, "layer": one.layer, "fingerprint": one.fingerprint} for one in edit.changes
    ]
    settings = {
        "target": edit.target,
        "method": edit.method,
        "layers": list(edit.layers),
        "changes": changes,
        "record": dict(edit.record),
        "tensors_sha256": _digest(path),
    }
    write_manifest(folder, kind=KIND, schema_version=SCHEMA_VERSION, settings=settings)
    return folder


def load_edit(folder: str | PathLike[str]) -> Edit:
    """Read an edit that `save_edit` wrote.

    Raises:
        StoreError: the folder is not an edit's, of another schema, or incomplete.
    """
    folder = Path(folder)
    settings: dict[str, Any] = read_manifest(folder, kind=KIND, schema_version=SCHEMA_VERSION)["settings"]
    path = folder / TENSORS_NAME
    if not path.is_file() or _digest(path) != settings["tensors_sha256"]:
        raise StoreError(f"{path} is missing or not the file that the manifest names; save the edit again.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise StoreError(f"{path} cannot be read ({error}); save the edit again.") from error
    changes = tuple(_change(index, one, tensors) for index, one in enumerate(settings["changes"]))
    return Edit(
        changes=changes,
        target=settings["target"],
        method=settings["method"],
        layers=tuple(settings["layers"]),
        record=settings["record"],
    )


def save_edited(model: VisionLanguageModel, edit: Edit, folder: str | PathLike[str]) -> Path:
    """Write the edited model as a checkpoint that transformers loads, processor included; the model stays as it was.

    Raises:
        StoreError: the folder exists and is not empty.
        EditError: the edit does not fit the model.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise StoreError(f"{folder} is not empty; give a new folder for the checkpoint.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with edit.on(model):
            model._module.save_pretrained(temporary)
        model.processor.save_pretrained(temporary)
        save_edit(edit, temporary / "edit")
        temporary.chmod(0o755)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _change(index: int, known: dict[str, Any], tensors: dict[str, Tensor]) -> LayerChange:
    shared = {"path": known["path"], "layer": known["layer"], "fingerprint": known["fingerprint"]}
    if known["kind"] == RankOneChange.kind:
        return RankOneChange(update=RankOne(tensors[f"{index}.left"], tensors[f"{index}.right"]), **shared)
    return DenseChange(whole=tensors[f"{index}.whole"], **shared)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
