"""What the answers in a folder cost: the judge's ledger, added up over all runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_lens_multimodal.autointerp.judges.base import Judge, Ledger
from sae_lens_multimodal.files import read_json, write_json

LEDGER = "ledger.json"
"""Name of the file."""


@contextmanager
def ledger_kept(judge: Judge, folder: Path) -> Iterator[None]:
    """Add what a judge does meanwhile to the folder's `ledger.json`, also where it ends in an error.

    Args:
        judge: what it did before does not count; it may have worked for another folder.
        folder: must be there.
    """
    before = judge.ledger.plus(Ledger())
    try:
        yield
    finally:
        path = folder / LEDGER
        earlier = Ledger.from_json(read_json(path)) if path.is_file() else Ledger()
        write_json(path, earlier.plus(judge.ledger.since(before)).to_json())
