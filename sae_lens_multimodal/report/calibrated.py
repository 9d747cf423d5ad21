"""How far a judge can be trusted, as the table that a report begins with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens_multimodal.autointerp.calibration import CONTROLS
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.files import read_json
from sae_lens_multimodal.report.formats import score
from sae_lens_multimodal.report.records import Cell, SummaryTable

FILE_NAME = "calibration.json"
_COLUMNS = ("asked about", "yes where right", "yes where wrong", "yes in all", "balanced accuracy", "strict", "failed")
_CONTROL = "{} (should be at chance)"


def read_calibration(path: Path) -> dict[str, Any]:
    """Read what the command `calibrate` wrote.

    Args:
        path: Its output folder, or the file in it.

    Raises:
        StoreError: it is no calibration.
    """
    file = path / FILE_NAME if path.is_dir() else path
    found = read_json(file)
    if not isinstance(found, dict) or not {"judge", "conditions"} <= set(found):
        raise StoreError(f"{file} is no calibration; expected what `sae-lens-multimodal calibrate --output` writes.")
    return found


def calibration_table(found: Mapping[str, Any]) -> SummaryTable:
    """Lay out a calibration.

    Args:
        found: `Calibration.to_json()`, or what `read_calibration` reads.
    """
    conditions = found["conditions"]
    above = [one["condition"] for one in conditions if _is_control(one) and one["is_at_chance"] is False]
    order = f"verdicts turned round by another order of the answers {score(found['flip_rate'])}"
    regions = f"explanations changed by another order of the regions {score(found['explanation_flip_rate'])}"
    right = f"planted features explained right {score(found['explained_right'])}"
    note = f"Expected calibration error {score(found['calibration_error'])}; {order}; {regions}; {right}."
    if above:
        note += f" Not at chance without the picture: {', '.join(above)}; do not trust the scores of this judge."
    return SummaryTable(
        caption=f"How far the judge can be trusted: {found['judge']}, on {found['n_features']} planted features",
        columns=_COLUMNS,
        rows=[_row(one) for one in conditions],
        note=note,
    )


def _is_control(one: Mapping[str, Any]) -> bool:
    return one["condition"] in CONTROLS


def _row(one: Mapping[str, Any]) -> list[Cell]:
    name = str(one["condition"])
    return [
        _CONTROL.format(name) if _is_control(one) else name,
        *(score(one[key]) for key in ("tpr", "fpr", "yes_rate")),
        _interval(one["balanced_accuracy"]),
        _interval(one["balanced_accuracy_strict"]),
        f"{one['n_failed']} of {one['n']}",
    ]


def _interval(found: Mapping[str, float] | None) -> str:
    if found is None:
        return score(None)
    return f"{score(found['mean'])} ({score(found['low'])} to {score(found['high'])})"
