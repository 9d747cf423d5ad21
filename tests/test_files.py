"""Files and manifests: whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.files import read_json, read_manifest, write_atomically, write_json, write_manifest


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "value.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_manifest_round_trip(tmp_path: Path) -> None:
    write_manifest(tmp_path, kind="thing", schema_version=3, settings={"x": 1})
    manifest = read_manifest(tmp_path, kind="thing", schema_version=3)
    assert manifest["settings"] == {"x": 1}
    assert manifest["versions"]["torch"]


def test_manifest_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        read_manifest(tmp_path, kind="thing", schema_version=1)
    write_manifest(tmp_path, kind="other", schema_version=1, settings={})
    with pytest.raises(StoreError, match="holds 'other'; expected 'thing'"):
        read_manifest(tmp_path, kind="thing", schema_version=1)
    write_manifest(tmp_path, kind="thing", schema_version=2, settings={})
    with pytest.raises(StoreError, match="schema version 2"):
        read_manifest(tmp_path, kind="thing", schema_version=1)


def test_broken_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_text("{")
    with pytest.raises(StoreError, match="not valid JSON"):
        read_json(path)
    with pytest.raises(StoreError, match="does not exist"):
        read_json(tmp_path / "missing.json")
