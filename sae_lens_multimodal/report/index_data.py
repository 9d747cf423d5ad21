"""The data of the index: a few numbers of every feature, which are loaded at once, and the rest in parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_multimodal.report.script_data import FOLDER, write_script
from sae_lens_multimodal.report.tokens import snippet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sae_lens_multimodal.report.view import ExampleView, FeatureView, ReportView

PART = 250
"""Features to a file."""
THUMBNAILS = 5
SNIPPETS = 3
SEARCHED_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """What the index shows and searches of one feature, as JSON values."""

    row: dict[str, Any]
    """What is loaded at once."""
    numbers: dict[str, tuple[float | None, float | None]]
    """Every score and every number of a measure with its control, by the name it has in the report."""
    details: dict[str, Any]
    """What is loaded in parts."""

    @classmethod
    def of(cls, feature: FeatureView) -> IndexEntry:
        """Take them from a feature's page."""
        return cls(row=_row(feature), numbers=dict(_numbers(feature)), details=_details(feature))


class IndexData:
    """Collects what the index shows and searches, and writes it as the features come.

    Args:
        folder: of the report.
        report: what is the same on all pages.
        sort: the order at first: "index", or "score:" and the name of a score.
    """

    def __init__(self, folder: Path, report: ReportView, *, sort: str) -> None:
        self._folder = folder / FOLDER
        self._report = report
        self._sort = sort
        self._columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        self._numbers: dict[str, list[list[float | None]]] = {
            name: [[], []] for name in (*report.score_names, *report.measure_names)
        }
        self._part: list[dict[str, Any]] = []
        self._n_parts = 0

    def add(self, entry: IndexEntry) -> None:
        """Add a feature; a part that is full goes to disk."""
        for name, value in entry.row.items():
            self._columns[name].append(value)
        for name, (values, controls) in self._numbers.items():
            value, control = entry.numbers.get(name, (None, None))
            values.append(rounded(value))
            controls.append(rounded(control))
        self._part.append(entry.details)
        if len(self._part) == PART:
            self._write_part()

    def finish(self) -> None:
        """Write what is left."""
        if self._part:
            self._write_part()
        head = {
            **self._columns,
            "numbers": self._numbers,
            "scores": list(self._report.score_names),
            "measures": list(self._report.measure_names),
            "sort": self._sort,
            "part": PART,
            "parts": self._n_parts,
        }
        write_script(self._folder / "index.js", "reportIndex", head)

    def _write_part(self) -> None:
        write_script(self._folder / f"part-{self._n_parts}.js", "reportPart", self._n_parts, self._part)
        self._n_parts += 1
        self._part = []


_COLUMNS = ("index", "label", "modality", "share", "density", "image", "text", "max")


def _row(feature: FeatureView) -> dict[str, Any]:
    found = feature.statistics
    return {
        "index": feature.index,
        "label": feature.label if feature.named else "",
        "modality": feature.modality,
        "share": rounded(found.modality_score),
        "density": rounded(found.density),
        "image": rounded(found.density_image),
        "text": rounded(found.density_text),
        "max": rounded(found.max_activation),
    }


def _numbers(feature: FeatureView) -> Iterator[tuple[str, tuple[float | None, float | None]]]:
    own = feature.runs[0]
    for score in own.scores:
        yield score.name, (score.value, score.control)
    for group in own.measures:
        for number in group.numbers:
            yield number.key, (number.value, number.control)


def _details(feature: FeatureView) -> dict[str, Any]:
    top = [group for group in feature.examples if group.kind == "top"]
    pictures = [example for group in top for example in group.pictures]
    texts = [example for group in top for example in group.texts]
    said = [one.text for one in feature.runs[0].explanations]
    written = [token.token for token in feature.output_tokens]
    return {
        "thumbs": _thumbs(pictures),
        "snippets": [snippet(example.tokens) for example in texts[:SNIPPETS]],
        "words": "\n".join([*said, *_searched(pictures + texts), *written]),
    }


def rounded(value: float | None) -> float | None:
    """Keep five significant digits: enough to sort by, and short; None of what is not a number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _thumbs(examples: list[ExampleView]) -> list[str]:
    """Addresses of the close views of the strongest pictures."""
    views = [view for example in examples for view in example.pictures[:1]]
    return [(view.crop or view.picture).url for view in views[:THUMBNAILS]]


def _searched(examples: list[ExampleView]) -> list[str]:
    """Tokens of text on which the feature is active, the strongest first, each once."""
    lit = [token for example in examples for token in example.tokens if token.kind == "text" and token.level > 0]
    ordered = sorted(lit, key=lambda token: -token.value)
    return list(dict.fromkeys(token.text.strip() for token in ordered))[:SEARCHED_TOKENS]
