"""Writing to disk so that a killed run leaves whole files, and saying in each folder what it holds."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sae_lens_multimodal.errors import StoreError

MANIFEST_NAME = "manifest.json"
PROVENANCE_PACKAGES = ("sae-lens-multimodal", "sae-lens", "nnsight", "transformers", "torch")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write an indented JSON file atomically. NaN is refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    """Read a JSON file.

    Raises:
        StoreError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{path} does not exist; expected a JSON file there.") from error
    except json.JSONDecodeError as error:
        raise StoreError(f"{path} is not valid JSON ({error}); delete it and run the step again.") from error


def package_versions() -> dict[str, str]:
    """The installed versions that a result depends on."""
    versions = {}
    for package in PROVENANCE_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def write_manifest(folder: Path, *, kind: str, schema_version: int, settings: Mapping[str, Any]) -> None:
    """Say in `folder/manifest.json` what the folder holds, and how it came to be."""
    write_json(
        folder / MANIFEST_NAME,
        {
            "kind": kind,
            "schema_version": schema_version,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": package_versions(),
            "settings": dict(settings),
        },
    )


def read_manifest(folder: Path, *, kind: str, schema_version: int) -> dict[str, Any]:
    """Read a folder's manifest and check that it is the expected kind and version.

    Raises:
        StoreError: the folder has no manifest, or holds something else.
    """
    if not (folder / MANIFEST_NAME).is_file():
        raise StoreError(f"{folder} has no {MANIFEST_NAME}; expected a folder of kind {kind!r} made by this package.")
    manifest: dict[str, Any] = read_json(folder / MANIFEST_NAME)
    if manifest.get("kind") != kind:
        raise StoreError(f"{folder} holds {manifest.get('kind')!r}; expected {kind!r}. Give another folder.")
    if manifest.get("schema_version") != schema_version:
        raise StoreError(
            f"{folder} has schema version {manifest.get('schema_version')!r}; this version of the package reads "
            f"{schema_version}. Make the folder again, or install the version that wrote it."
        )
    return manifest
