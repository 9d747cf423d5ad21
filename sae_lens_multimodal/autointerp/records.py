"""Folders of results that grow line by line: a manifest and JSONL files that survive being killed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.files import MANIFEST_NAME, read_manifest, write_manifest, write_text


class RecordFolder:
    """A folder with a manifest that says how its records came to be, and JSONL files of records.

    Args:
        folder: made if missing; an existing one must have been made with the same settings.
        kind: what the folder holds.
        schema_version: of its records.
        settings: everything that the records depend on; JSON values.

    Raises:
        StoreError: the folder was made with other settings, holds something else, or has files but no manifest.
    """

    def __init__(self, folder: Path | str, *, kind: str, schema_version: int, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        settings = json.loads(json.dumps(dict(settings)))
        if not (self.folder / MANIFEST_NAME).is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise StoreError(f"{self.folder} has files but no {MANIFEST_NAME}; give a new or an empty folder.")
            write_manifest(self.folder, kind=kind, schema_version=schema_version, settings=settings)
            return
        found = read_manifest(self.folder, kind=kind, schema_version=schema_version)["settings"]
        differing = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
        if differing:
            key = differing[0]
            raise StoreError(
                f"{self.folder} was made with other settings ({', '.join(differing)}): {key} was {found.get(key)!r}, "
                f"now {settings.get(key)!r}. Give another folder, or the same settings to go on."
            )

    def path(self, name: str) -> Path:
        """Where records of that name lie."""
        return self.folder / f"{name}.jsonl"

    def read(self, name: str) -> list[dict[str, Any]]:
        """Read all whole records; a last line torn by a killed run is cut off the file."""
        path = self.path(name)
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            write_text(path, text)
        return [record for _, record in json_lines(path)]

    def append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records at the end; they are on their way to the disk when this returns."""
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with self.path(name).open("a", encoding="utf-8") as file:
            file.write(lines)

    def replace(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Write these records instead of what is there, in one step."""
        lines = (json.dumps(record, allow_nan=False) + "\n" for record in records)
        write_text(self.path(name), "".join(lines))


def lines_of_folder(
    folder: Path | str, name: str, *, kind: str, schema_version: int
) -> Iterable[tuple[int, dict[str, Any]]]:
    """Read the records of a folder; there are none yet where it has its manifest but not the file.

    Raises:
        StoreError: there is neither that file nor a manifest of that kind, or a line is not a JSON object.
    """
    path = Path(folder) / f"{name}.jsonl"
    if path.is_file():
        return json_lines(path)
    read_manifest(Path(folder), kind=kind, schema_version=schema_version)
    return ()


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a JSONL file: number and object of every line that is not blank.

    Raises:
        StoreError: the file is missing, or a line is not a JSON object.
    """
    if not path.is_file():
        raise StoreError(f"{path} does not exist; expected a file with one JSON object on every line.")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise StoreError(f"{path}, line {number} is not JSON ({error}); correct or remove that line.") from error
        if not isinstance(record, dict):
            raise StoreError(f"{path}, line {number} is {type(record).__name__}; expected a JSON object.")
        yield number, record
