"""Folders of one page that opens from disk, with its numbers as JSON beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.files import MANIFEST_NAME, read_json, write_json, write_manifest, write_text
from sae_lens_multimodal.report.render import environment, static_text


@dataclass(frozen=True, kw_only=True)
class SinglePage:
    """A kind of page."""

    kind: str
    """Of the manifest; the template and the file of numbers are named after it."""
    what: str
    """What it shows, for people."""
    schema_version: int

    def write(self, output: Path | str, *, title: str, views: list[Any], numbers: Any) -> Path:  # noqa: ANN401 - JSON
        """Write the folder, and return the page; an earlier page of this kind is replaced.

        Raises:
            StoreError: the folder is a file, or holds something else than an earlier page of this kind.
        """
        folder = Path(output).resolve()
        self._check(folder)
        page = environment().get_template(f"{self.kind}.html.j2").render(report={"title": title}, views=views, root="")
        write_text(folder / "static" / "report.css", static_text("report.css"))
        write_json(folder / f"{self.kind}.json", numbers)
        write_text(folder / "index.html", page)
        settings = {"title": title, "n_views": len(views)}
        write_manifest(folder, kind=self.kind, schema_version=self.schema_version, settings=settings)
        return folder / "index.html"

    def _check(self, folder: Path) -> None:
        """See that nothing of the user's own would be replaced."""
        if not folder.exists():
            return
        if not folder.is_dir():
            raise StoreError(f"{folder} is a file; give a folder for the page.")
        found = {entry.name for entry in folder.iterdir()}
        if not found:
            return
        manifest = read_json(folder / MANIFEST_NAME) if MANIFEST_NAME in found else {}
        kind = manifest.get("kind") if isinstance(manifest, dict) else None
        if kind != self.kind or found - {MANIFEST_NAME, "index.html", f"{self.kind}.json", "static"}:
            raise StoreError(f"{folder} is not empty and holds no page of {self.what}; give a new folder.")
