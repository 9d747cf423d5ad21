"""The table of families in the docs is that of the families."""

from __future__ import annotations

from sae_lens_multimodal.adapters.registry import find_family, registered_families
from tests.adapters.families_page import COMMAND, PAGE, page


def test_the_table_in_the_docs_is_up_to_date() -> None:
    written = PAGE.read_text()
    assert page(written) == written, f"docs/families.md is out of date; rewrite it with: {COMMAND}"


def test_no_checkpoint_belongs_to_two_structures() -> None:
    names = [name for family in registered_families() for one in find_family(family).released for name in one.names]
    assert len(set(names)) == len(names)
    assert all(name.count("/") == 1 for name in names)
