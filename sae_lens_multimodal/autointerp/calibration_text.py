"""What a calibration found, in words: a table, a few lines, and how far two judges agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_lens_multimodal.autointerp.calibration import CONTROLS, Calibration, Confidence, agreement
from sae_lens_multimodal.autointerp.metrics import Interval
from sae_lens_multimodal.errors import StoreError

_CONFIDENCES: Mapping[Confidence, str] = {
    "probabilities": "the probabilities it gives",
    "crops": "the share of yes over crops",
}


def calibration_lines(found: Calibration) -> list[str]:
    """Write a calibration as a Markdown table and a few lines."""
    lines = [
        f"judge {found.judge}, {found.n_features} planted features, prompts {found.prompts}",
        "",
        "| asked about | yes where right | yes where wrong | yes in all | balanced accuracy | strict | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found.conditions:
        title = f"{one.condition} (should be at chance)" if one.condition in CONTROLS else one.condition
        cells = [title, *map(_number, (one.tpr, one.fpr, one.yes_rate)), _interval(one.balanced_accuracy)]
        cells += [_interval(one.balanced_accuracy_strict), f"{one.n_failed} of {one.n}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"expected calibration error {_number(found.calibration_error)} (of {_CONFIDENCES[found.confidence]}), "
        f"verdicts flipped by another order of the answers {_number(found.flip_rate)}, explanations changed by another "
        f"order of the regions {_number(found.explanation_flip_rate)}, planted features explained right "
        f"{_number(found.explained_right)}",
    ]
    above = [one.condition for one in found.conditions if one.condition in CONTROLS and one.is_at_chance is False]
    if above:
        lines.append(f"NOT at chance without the picture: {', '.join(above)}; do not trust this judge's scores.")
    return lines


def agreement_line(found: Calibration, other: Mapping[str, Any]) -> str:
    """Say how far two judges agree on the questions that both answered.

    Args:
        found: of one judge.
        other: `Calibration.to_json()` of another, as a file holds it.

    Raises:
        StoreError: it is no calibration.
    """
    if not isinstance(other, Mapping) or not isinstance(other.get("answers"), Mapping) or "judge" not in other:
        raise StoreError("What is compared with is no calibration; expected what `calibrate --output` writes.")
    kappa = agreement(found.answers, other["answers"])
    return f"agreement with {other['judge']} (Cohen's kappa): {_number(kappa)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _interval(found: Interval | None) -> str:
    return "-" if found is None else f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"
