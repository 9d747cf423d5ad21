"""Activations on disk: sharded safetensors with a label for every token, checksummed, read through memory maps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.files import MANIFEST_NAME, read_manifest, write_atomically, write_manifest
from sae_lens_multimodal.training.checkpoint import one_line
from sae_lens_multimodal.training.tree_file import load_tree, save_tree

KIND = "activations"
SCHEMA_VERSION = 1
PROGRESS_NAME = "progress.safetensors"
"""What a writer that was killed goes on from; gone once the cache is whole."""
TRAIN, HELD_OUT = "train", "held_out"
PER_TOKEN = ("modality", "image_index", "tile", "row")
PER_BATCH = ("batch_tokens", "batch_prompts")
LABEL_BYTES = 1 + 4 + 4 + 8
"""What the labels of one token take."""
_CHUNK = 1 << 22


class TokenLabels(NamedTuple):
    """What each token of a batch is."""

    modality: Int[Tensor, " n"]
    """`Modality`, int8."""
    image_index: Int[Tensor, " n"]
    """Which picture of its prompt; -1 where none. int32."""
    tile: Int[Tensor, " n"]
    """0 in the view of the whole picture, 1 and up in its tiles, -1 where none. int32."""
    row: Int[Tensor, " n"]
    """The prompt's row, counted in the order of its epoch. int64."""


@dataclass
class Shard:
    """One file of a cache."""

    name: str
    part: str
    """`train` or `held_out`."""
    n_tokens: int
    n_batches: int
    n_bytes: int
    sha256: str


@dataclass
class Pending:
    """Batches that wait to be written together."""

    activations: list[Tensor] = field(default_factory=list)
    labels: list[TokenLabels] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """What the activations and their labels take."""
        return sum(part.numel() * part.element_size() + len(part) * LABEL_BYTES for part in self.activations)


class CacheWriter:
    """Writes shards, each whole or not at all, and what a killed writer needs to go on."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, shard_bytes: int) -> None:
        """Open a folder, new or left by a writer that was killed.

        Raises:
            StoreError: the folder holds something else, a whole cache, or one with other settings.
        """
        self.folder = folder
        self.settings = dict(settings)
        self.shard_bytes = shard_bytes
        self.shards: list[Shard] = []
        self.state: Any = None
        """What the writer before this one left: the state of whatever it read from."""
        self._pending = Pending()
        if (folder / MANIFEST_NAME).is_file():
            raise StoreError(f"{folder} holds a whole cache already; train from it, or give another folder.")
        if (folder / PROGRESS_NAME).is_file():
            self._go_on()
        elif folder.is_dir() and any(not _is_debris(child) for child in folder.iterdir()):
            raise StoreError(f"{folder} holds other files; give another folder.")
        folder.mkdir(parents=True, exist_ok=True)

    def _go_on(self) -> None:
        progress = load_tree(self.folder / PROGRESS_NAME)
        changed = [name for name, value in self.settings.items() if progress["settings"].get(name) != value]
        if changed:
            raise StoreError(
                f"{self.folder} was begun with other settings ({', '.join(changed)}); go on with the same "
                "ones, or give another folder."
            )
        self.shards = [Shard(**entry) for entry in progress["shards"]]
        self.state = progress["state"]
        known = {shard.name for shard in self.shards}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in known and path.name != PROGRESS_NAME:
                path.unlink()

    @property
    def is_due(self) -> bool:
        """Whether what waits fills a shard."""
        return self._pending.n_bytes >= self.shard_bytes

    def add(self, activations: Float[Tensor, "n d"], labels: TokenLabels, n_prompts: int) -> None:
        """Take a batch; it is written at the next `flush`."""
        self._pending.activations.append(activations.cpu())
        self._pending.labels.append(labels)
        self._pending.prompts.append(n_prompts)

    def flush(self, part: str, state: object) -> None:
        """Write what waits as a shard, and note `state`, from which to go on after it.

        Raises:
            StoreError: the disk is full; earlier shards are whole, and the same call goes on after them.
        """
        pending, self._pending = self._pending, Pending()
        try:
            if pending.activations:
                self.shards.append(self._write(part, pending))
            progress = {"settings": self.settings, "shards": [asdict(shard) for shard in self.shards], "state": state}
            write_atomically(self.folder / PROGRESS_NAME, lambda path: save_tree(path, progress))
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"The cache {self.folder} cannot be written ({one_line(error)}); what is there is whole: free space "
                "and start the same command again."
            ) from error

    def _write(self, part: str, pending: Pending) -> Shard:
        name = f"{part}-{sum(shard.part == part for shard in self.shards):05d}.safetensors"
        tensors = {
            label: torch.cat([getattr(labels, label) for labels in pending.labels]).contiguous() for label in PER_TOKEN
        }
        tensors["activations"] = torch.cat(pending.activations).contiguous()
        tensors["batch_tokens"] = torch.tensor([len(rows) for rows in pending.activations])
        tensors["batch_prompts"] = torch.tensor(pending.prompts)
        path = self.folder / name
        write_atomically(path, lambda temporary: save_file(tensors, temporary))
        n_tokens = len(tensors["activations"])
        return Shard(name, part, n_tokens, len(pending.prompts), path.stat().st_size, sha256_of(path))

    def finish(self, settings: Mapping[str, Any]) -> None:
        """Say that the cache is whole."""
        shards = [asdict(shard) for shard in self.shards]
        write_manifest(self.folder, kind=KIND, schema_version=SCHEMA_VERSION, settings={**settings, "shards": shards})
        (self.folder / PROGRESS_NAME).unlink(missing_ok=True)


def _is_debris(path: Path) -> bool:
    return path.name.startswith((f".{TRAIN}-", f".{HELD_OUT}-", f".{PROGRESS_NAME}"))


def sha256_of(path: Path) -> str:
    """The checksum of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


class CachedBatch(NamedTuple):
    """One batch as the model gave it."""

    activations: Float[Tensor, "n d"]
    """In the precision that the model gave them."""
    labels: TokenLabels


class CacheReader:
    """Reads single batches of a whole cache; only what is asked for comes into memory."""

    def __init__(self, folder: str | Path) -> None:
        """Open a cache.

        Raises:
            StoreError: there is none, it is not whole, or shards are missing or cut short.
        """
        self.folder = Path(folder)
        if (self.folder / PROGRESS_NAME).is_file() and not (self.folder / MANIFEST_NAME).is_file():
            raise StoreError(f"The cache {folder} is not whole; start `sae-lens-multimodal cache` again, it goes on.")
        self.settings: dict[str, Any] = read_manifest(self.folder, kind=KIND, schema_version=SCHEMA_VERSION)["settings"]
        self.shards = [Shard(**entry) for entry in self.settings["shards"]]
        for shard in self.shards:
            path = self.folder / shard.name
            if not path.is_file() or path.stat().st_size != shard.n_bytes:
                raise StoreError(f"{path} is missing or cut short; delete {folder} and cache again.")
        self._files: dict[str, Any] = {}
        self._small: dict[str, dict[str, Tensor]] = {}
        self._places = {part: self._places_of(part) for part in (TRAIN, HELD_OUT)}

    def _places_of(self, part: str) -> list[tuple[Shard, int]]:
        return [(shard, at) for shard in self.shards if shard.part == part for at in range(shard.n_batches)]

    def n_batches(self, part: str = TRAIN) -> int:
        """How many batches a part holds."""
        return len(self._places[part])

    def n_prompts(self, index: int, part: str = TRAIN) -> int:
        """How many prompts a batch had."""
        shard, at = self._places[part][index]
        return int(self._labels(shard)["batch_prompts"][at])

    def read(self, index: int, part: str = TRAIN) -> CachedBatch:
        """One batch, in memory of its own.

        Raises:
            StoreError: its shard is not what was written.
        """
        shard, at = self._places[part][index]
        small = self._labels(shard)
        end = int(small["batch_tokens"][: at + 1].sum())
        start = end - int(small["batch_tokens"][at])
        labels = TokenLabels(*(small[name][start:end] for name in PER_TOKEN))
        return CachedBatch(self._files[shard.name].get_slice("activations")[start:end].clone(), labels)

    def held_out(self) -> Iterator[CachedBatch]:
        """The batches that are never trained on."""
        for index in range(self.n_batches(HELD_OUT)):
            yield self.read(index, HELD_OUT)

    def _labels(self, shard: Shard) -> dict[str, Tensor]:
        if shard.name not in self._small:
            path = self.folder / shard.name
            # Once for each shard, when it is first needed: a cache may be larger than memory.
            if sha256_of(path) != shard.sha256:
                raise StoreError(
                    f"{path} is not what was written: its checksum differs; delete {self.folder} and cache again."
                )
            file = safe_open(path, framework="pt")
            self._files[shard.name] = file
            self._small[shard.name] = {name: file.get_tensor(name) for name in (*PER_TOKEN, *PER_BATCH)}
        return self._small[shard.name]
