"""The table of docs/families.md, from the registered families themselves: `python -m tests.adapters.families_page`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sae_lens_multimodal.adapters.family import Family
from sae_lens_multimodal.adapters.registry import find_family, registered_families

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
COMMAND = "python -m tests.adapters.families_page"
BEGIN, END = f"<!-- made by `{COMMAND}`: do not edit -->", "<!-- end of what is made -->"
HEADS = ("family (`config.model_type`)", "named hooks", "boxes", "checkpoints to load by name")
SIZES = ((64, 64), (100, 60), (30, 90), (900, 40), (700, 500), (2600, 2000))
"""Sizes of pictures for which boxes may be exact or not."""


def table() -> str:
    """The table in Markdown, one line for each family that comes with the package."""
    rows = [_row(name) for name in registered_families(built_in=True)]
    lines = [HEADS, ("---",) * len(HEADS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(name: str) -> tuple[str, ...]:
    found = find_family(name)
    families = [_without_model(found, structure) for structure in ({}, *(one.structure for one in found.released))]
    title = (found.__doc__ or "").split(":")[0].split("\n")[0].rstrip(".")
    checkpoints = ", ".join(f"`{checkpoint}`" for one in found.released for checkpoint in one.names)
    return f"{title} (`{name}`)", _hooks(families[0]), _boxes(families), checkpoints or "none by name"


def _without_model(found: type[Family], structure: object) -> Family:
    module, processor = found.random_model(0, **structure)  # type: ignore[arg-type] # keyword arguments
    return found.of(module, processor)


def _hooks(family: Family) -> str:
    names = {re.sub(r"\.\d+\.", ".N.", point.name) for point in family.hook_points()}
    counts = {
        "each block": sum(name.startswith("blocks.") for name in names),
        "each vision block": sum(name.startswith("vision.blocks.") for name in names),
        "the projector": sum(name.startswith("projector.") for name in names),
    }
    return ", ".join(f"{count} in {where}" for where, count in counts.items() if count)


def _boxes(families: list[Family]) -> str:
    reasons = [reason for family in families for reason in _reasons(family)]
    why = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
    if not why:
        return "exact"
    return f"exact, but for some pictures: {why}" if "" in reasons else f"not exact: {why}"


def _reasons(family: Family) -> Iterator[str]:
    for prompt in (*((size,) for size in SIZES), SIZES):
        for tokens in family.row_tokens(prompt):
            yield tokens.inexact


def page(before: str) -> str:
    """The page with its table made anew."""
    start, stop = before.index(BEGIN) + len(BEGIN), before.index(END)
    return f"{before[:start]}\n{table()}\n{before[stop:]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
