"""States gathered for a word: in memory, and as a folder of shards that a killed run leaves whole."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_multimodal.data.skips import SkipReport
from sae_lens_multimodal.errors import ConfigError, DatasetError, StoreError
from sae_lens_multimodal.files import (
    MANIFEST_NAME,
    read_json,
    read_manifest,
    write_atomically,
    write_json,
    write_manifest,
)
from sae_lens_multimodal.hooks.control_split import linked

logger = logging.getLogger(__name__)

STATES_KIND = "concept_states"
PROGRESS_KIND = "concept_states_in_progress"
SCHEMA_VERSION = 2
PROGRESS_NAME = "progress.json"
SAVE_SECONDS = 30.0
"""A run under way is saved about so often, whether a shard is full or not."""


@dataclass(frozen=True, eq=False)
class StateShard:
    """Some states, and what each was read from."""

    states: Float[Tensor, "n d"]
    row: Int64[Tensor, " n"]
    """The dataset's row."""
    position: Int64[Tensor, " n"]
    """The token whose state it is, padding not counted; of a mean the first."""
    word: Int64[Tensor, "n 2"]
    """The word's own tokens: the first, and one beyond the last."""
    captions: list[str]
    """The text that holds the word."""
    shows: list[list[str]]
    """Names of what its prompt shows: of each picture, by its pixels; of the caption where there is none."""

    def __len__(self) -> int:
        """Return the number of states."""
        return len(self.states)

    @classmethod
    def joined(cls, parts: Sequence[StateShard]) -> StateShard:
        """Put parts behind one another."""
        return cls(
            torch.cat([one.states for one in parts]),
            torch.cat([one.row for one in parts]),
            torch.cat([one.position for one in parts]),
            torch.cat([one.word for one in parts]),
            [caption for one in parts for caption in one.captions],
            [names for one in parts for names in one.shows],
        )

    def chosen(self, mask: Bool[Tensor, " n"]) -> StateShard:
        """Keep some."""
        kept = mask.nonzero()[:, 0].tolist()
        captions, shows = [self.captions[one] for one in kept], [self.shows[one] for one in kept]
        return StateShard(self.states[mask], self.row[mask], self.position[mask], self.word[mask], captions, shows)

    def save(self, path: Path) -> None:
        """Write one file, in one step."""
        tensors = {"states": self.states, "row": self.row, "position": self.position, "word": self.word}
        # One entry: safetensors writes several in an order that changes from run to run.
        note = {"texts": json.dumps({"captions": self.captions, "shows": self.shows}, ensure_ascii=False)}
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(path, lambda temporary: save_file(whole, temporary, metadata=note))

    @classmethod
    def load(cls, path: Path) -> StateShard:
        """Read one file.

        Raises:
            StoreError: it is missing or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                states, row, position, word = map(file.get_tensor, ("states", "row", "position", "word"))
                return cls(states, row, position, word, **json.loads(file.metadata()["texts"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path} cannot be read ({error}); gather the states again.") from error


@dataclass(frozen=True, eq=False)
class ConceptStates:
    """The states of one word at one hook of one model."""

    shard: StateShard = field(repr=False)
    settings: dict[str, Any]
    """What was asked for: word, hook, model, place, dataset."""
    report: SkipReport = field(default_factory=SkipReport)
    """Rows read and skipped, and why."""
    n_without: int = 0
    """Rows whose caption does not hold the word."""

    def __len__(self) -> int:
        """Return the number of states."""
        return len(self.shard)

    @property
    def states(self) -> Float[Tensor, "n d"]:
        """The states, in the order of the dataset."""
        return self.shard.states

    @property
    def rows(self) -> list[int]:
        """The dataset's row of each state."""
        rows: list[int] = self.shard.row.tolist()
        return rows

    @property
    def captions(self) -> list[str]:
        """The caption of each state."""
        return self.shard.captions

    @property
    def hook_name(self) -> str:
        """Where the states were read."""
        return str(self.settings["hook_name"])

    @property
    def model_name(self) -> str:
        """The model they are of."""
        return str(self.settings["model_name"])

    @property
    def word(self) -> str:
        """The word or phrase."""
        return str(self.settings["word"])

    def summary(self) -> str:
        """One line for people."""
        return f"{len(self)} states of {self.word!r} from {self.report.summary()}; {self.n_without} without the word"

    def split(self, share: float = 0.5, *, seed: int = 0) -> tuple[ConceptStates, ConceptStates]:
        """Split at random into what concepts are found on and what they are measured on; no picture is on both sides.

        Rows that a chain of shared pictures links stay together; of rows without pictures those of the same caption.

        Args:
            share: Of the rows, in the first part, about.
            seed: From which the split follows.

        Raises:
            ConfigError: the share is out of range.
        """
        if not 0 < share <= 1:
            raise ConfigError(f"Got share={share}; expected more than 0 and at most 1, of the rows for the first part.")
        rows = list(dict.fromkeys(self.rows))
        shown = {row: frozenset(names) for row, names in zip(self.rows, self.shard.shows, strict=True)}
        groups: dict[int, list[int]] = {}
        for row, group in zip(rows, linked([shown[row] for row in rows]), strict=True):
            groups.setdefault(group, []).append(row)
        first = self.shard.row.new_tensor(_drawn(list(groups.values()), round(share * len(rows)), seed))
        mask = torch.isin(self.shard.row, first)
        if share < 1 and bool(mask.all()):
            logger.warning(
                "all %d rows with %r are linked by the pictures they share, so nothing can be held out; gather more",
                len(rows),
                self.word,
            )
        return self._only(mask), self._only(~mask)

    def _only(self, mask: Tensor) -> ConceptStates:
        return ConceptStates(self.shard.chosen(mask), self.settings, self.report, self.n_without)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `gather_states` wrote.

        Raises:
            StoreError: the folder is something else, or unfinished.
        """
        folder = Path(folder)
        if _is_unfinished(folder):
            raise StoreError(f"{folder} holds an unfinished gathering; run the same one again to complete it.")
        settings = read_manifest(folder, kind=STATES_KIND, schema_version=SCHEMA_VERSION)["settings"]
        done = settings.pop("result")
        shards = [StateShard.load(folder / name) for name in done["shards"]]
        return cls(StateShard.joined(shards), settings, SkipReport.from_dict(done["report"]), done["n_without"])


def _drawn(groups: Sequence[list[int]], wanted: int, seed: int) -> list[int]:
    """Draw groups until about as many rows are there as wanted, and at least one group.

    >>> len(_drawn([[0], [1], [2, 3, 4], [5]], 3, 0)) in (2, 3, 4)
    True
    """
    taken: list[int] = []
    for place in torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist():
        # A group that would go further beyond what is wanted than it is short of it now stays out.
        if not taken or len(taken) + len(groups[place]) / 2 <= wanted:
            taken += groups[place]
    return taken


class StateWriter:
    """Collects states; writes them out in shards where there is a folder, and then can go on where it was killed."""

    def __init__(self, folder: Path | None, settings: dict[str, Any], shard_states: int, *, resume: bool) -> None:
        self._folder, self._settings, self._shard_states = folder, settings, shard_states
        self.next_row, self.n_states, self.n_without, self.n_read = 0, 0, 0, 0
        self.report = SkipReport()
        self.shards: list[str] = []
        self._waiting: list[StateShard] = []
        self._aside: str | None = None
        self._saved_at = -float("inf")
        self.finished: ConceptStates | None = None
        if folder is not None:
            self._begin(folder, resume)

    def _begin(self, folder: Path, resume: bool) -> None:
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file; give a folder to write the states into.")
        if (folder / MANIFEST_NAME).is_file():
            self._continue(folder, resume)
            return
        if folder.is_dir() and any(folder.iterdir()):
            raise StoreError(f"{folder} is not empty and holds no states; give an empty or new folder.")
        write_manifest(folder, kind=PROGRESS_KIND, schema_version=SCHEMA_VERSION, settings=self._settings)

    def _continue(self, folder: Path, resume: bool) -> None:
        unfinished = _is_unfinished(folder)
        kind = PROGRESS_KIND if unfinished else STATES_KIND
        known = read_manifest(folder, kind=kind, schema_version=SCHEMA_VERSION)["settings"]
        for name, wanted in self._settings.items():
            if known.get(name) != json.loads(json.dumps(wanted)):
                raise StoreError(
                    f"{folder} holds states gathered with {name}={known.get(name)!r}, not {wanted!r}; give another "
                    "folder, or the same settings."
                )
        if not resume:
            raise StoreError(f"{folder} holds states already and resume is off; give an empty folder.")
        if not unfinished:
            self.finished = ConceptStates.load(folder)
            return
        if not (folder / PROGRESS_NAME).is_file():
            return  # killed before anything was saved
        seen = read_json(folder / PROGRESS_NAME)
        self.next_row, self.n_states, self.n_without = seen["next_row"], seen["n_states"], seen["n_without"]
        self.n_read, self.shards = seen["n_read"], seen["shards"]
        self.report = SkipReport.from_dict(seen["report"])
        self._aside = seen["waiting"]
        if self._aside is not None:
            self._waiting = [StateShard.load(folder / self._aside)]

    def _progress(self) -> dict[str, Any]:
        return {
            "next_row": self.next_row,
            "n_read": self.n_read,
            "n_states": self.n_states,
            "n_without": self.n_without,
            "shards": self.shards,
            "waiting": self._aside,
            "report": self.report.to_dict(),
        }

    def add(self, shard: StateShard | None) -> None:
        """Take the states of a batch, if there are any; the counts must be those up to that batch.

        What is full becomes a shard. What waits for more is saved beside it now and then, so that a run killed long
        before a shard is full, or between rare words, goes on near where it was.
        """
        if shard is not None and len(shard):
            self._waiting.append(shard)
            self.n_states += len(shard)
        if self._folder is None:
            return
        if sum(map(len, self._waiting)) >= self._shard_states:
            self._flush(self._folder)
        elif time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self._set_aside(self._folder)

    def _flush(self, folder: Path) -> None:
        if self._waiting:
            name = f"states-{len(self.shards):05d}.safetensors"
            StateShard.joined(self._waiting).save(folder / name)
            self.shards.append(name)
            self._waiting = []
        self._save(folder, None)

    def _set_aside(self, folder: Path) -> None:
        name = f"waiting-{self.n_states:09d}.safetensors" if self._waiting else None
        if name is not None and name != self._aside:
            StateShard.joined(self._waiting).save(folder / name)
        self._save(folder, name)

    def _save(self, folder: Path, aside: str | None) -> None:
        self._aside = aside
        write_json(folder / PROGRESS_NAME, self._progress())
        self._saved_at = time.monotonic()
        for old in folder.glob("waiting-*.safetensors"):
            if old.name != aside:
                old.unlink()

    def finish(self) -> ConceptStates:
        """Write what is left, and the manifest last; give everything.

        Raises:
            DatasetError: there are no states.
        """
        if not self.n_states:
            raise DatasetError(
                f"No states of {self._settings['word']!r} were found: {self.report.summary()}; {self.n_without} rows "
                "do not hold the word. Give another word or more rows."
            )
        if self._folder is None:
            return ConceptStates(StateShard.joined(self._waiting), self._settings, self.report, self.n_without)
        self._flush(self._folder)
        result = {"shards": self.shards, "report": self.report.to_dict(), "n_without": self.n_without}
        write_manifest(
            self._folder,
            kind=STATES_KIND,
            schema_version=SCHEMA_VERSION,
            settings={**self._settings, "result": result},
        )
        (self._folder / PROGRESS_NAME).unlink(missing_ok=True)
        return ConceptStates.load(self._folder)


def _is_unfinished(folder: Path) -> bool:
    manifest = folder / MANIFEST_NAME
    return manifest.is_file() and read_json(manifest).get("kind") == PROGRESS_KIND
