"""Checkpoints of an unfinished pass: how far it got, and all that it remembers, in one file."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from sae_lens_multimodal.data.rows import SkipReport
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.features.near import NearPictures
from sae_lens_multimodal.features.schema import PROGRESS_KIND, SCHEMA_VERSION, STORE_KIND, TABLES, StorePaths
from sae_lens_multimodal.features.state import HarvestState
from sae_lens_multimodal.files import MANIFEST_NAME, read_manifest, write_atomically, write_manifest

_STATE_NAME = "state.safetensors"
_MOST_EXAMPLES = 5
_NEAR = "near."


@dataclass
class Position:
    """How far a pass got."""

    next_row: int = 0
    """The first row of the dataset that was not read."""
    n_read: int = 0
    """Prompts taken from the dataset, those dropped when encoding included."""
    n_prompts: int = 0
    """Prompts that the model has seen."""
    shards: list[str] = field(default_factory=list)
    """Files of the prompt shelf."""
    report: dict[str, Any] = field(default_factory=lambda: SkipReport().to_dict())
    """Of the rows before `next_row`."""
    pictures: dict[str, int] = field(default_factory=lambda: {"seen": 0, "distinct": 0, "near_duplicates": 0})
    """Pictures met, those unlike all before, and those that only look like an earlier one; the rest were repeated."""

    def count_pictures(self, names: Sequence[Sequence[str]], near: Sequence[Sequence[str]], distinct: int) -> None:
        """Count the pictures of a batch.

        Args:
            names: Of every prompt the content names of its pictures.
            near: The content names of what they look like.
            distinct: How many pictures so far looked like none before them.
        """
        pairs = [pair for prompt in zip(names, near, strict=True) for pair in zip(*prompt, strict=True)]
        self.pictures["seen"] += len(pairs)
        self.pictures["distinct"] = distinct
        self.pictures["near_duplicates"] += sum(name != first for name, first in pairs)


class Progress:
    """The folder of an unfinished pass."""

    def __init__(self, paths: StorePaths) -> None:
        self._paths = paths
        self._file = paths.progress / _STATE_NAME

    def begin(self, request: dict[str, Any]) -> None:
        """Note what the pass was asked for."""
        write_manifest(self._paths.progress, kind=PROGRESS_KIND, schema_version=SCHEMA_VERSION, settings=request)

    def save(self, state: HarvestState, near: NearPictures, position: Position) -> None:
        """Write a checkpoint, in one step."""
        note = {"position": json.dumps(asdict(position))}
        tensors = {**state.tensors(), **{f"{_NEAR}{name}": value for name, value in near.tensors().items()}}
        write_atomically(self._file, lambda temporary: save_file(tensors, temporary, metadata=note))

    def load(self, state: HarvestState, near: NearPictures) -> Position:
        """Restore the latest checkpoint into `state` and `near`; the beginning where there is none."""
        if not self._file.is_file():
            return Position()
        with safe_open(self._file, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            near.restore(
                {name.removeprefix(_NEAR): tensors.pop(name) for name in list(tensors) if name.startswith(_NEAR)}
            )
            state.restore(tensors)
            return Position(**json.loads(file.metadata()["position"]))

    def remove(self) -> None:
        """Delete the folder, and temporary files of a killed pass: this one is finished."""
        for name in TABLES:
            for leftover in self._paths.folder.glob(f".{name}.parquet.*"):
                leftover.unlink()
        shutil.rmtree(self._paths.progress)


def existing_work(paths: StorePaths, request: dict[str, Any], *, resume: bool) -> str | None:
    """What the output folder holds: nothing, or this very harvest, unfinished or complete.

    Returns:
        None, `PROGRESS_KIND` or `STORE_KIND`.

    Raises:
        StoreError: it holds something else, or a harvest with other settings, or `resume` is off and it is not empty.
    """
    folder = paths.folder
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not folder.is_dir():
        raise StoreError(f"{folder} is a file; give a folder to write the feature store into.")
    if not resume:
        raise StoreError(f"{folder} is not empty and resume is off; give an empty folder, or allow resuming.")
    kind, place = (PROGRESS_KIND, paths.progress) if paths.progress.is_dir() else (STORE_KIND, folder)
    if kind == PROGRESS_KIND and not (place / MANIFEST_NAME).is_file():
        return None
    settings = read_manifest(place, kind=kind, schema_version=SCHEMA_VERSION)["settings"]
    for name, wanted in request.items():
        if settings.get(name) != wanted:
            raise StoreError(
                f"{folder} holds a harvest with {name}={_short(settings.get(name))}; this one has {name}="
                f"{_short(wanted)}. Give another folder, or the settings of the harvest that is to be continued."
            )
    return kind


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def joined_report(earlier: dict[str, Any], later: SkipReport) -> dict[str, Any]:
    """One report, as `SkipReport.to_dict` gives it, of the rows before a resumption and those after."""
    report = SkipReport(
        read=earlier["read"] + later.read, reasons=Counter(earlier["reasons"]) + Counter(later.reasons), examples={}
    )
    for reason in report.reasons:
        seen = [tuple(one) for one in earlier["examples"].get(reason, [])] + later.examples.get(reason, [])
        report.examples[reason] = seen[:_MOST_EXAMPLES]
    return report.to_dict()
