"""The sum of many measures: means with bootstrap intervals over features, and why some have no numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_lens_multimodal.autointerp.explanation import ModalityName
from sae_lens_multimodal.autointerp.measurer import Measure
from sae_lens_multimodal.autointerp.metrics import Interval, bootstrap_mean


@dataclass(frozen=True, kw_only=True)
class MeasureSummary:
    """One number of one measure over all features."""

    measurer: str
    modality: ModalityName
    value: str
    """Which number."""
    n_features: int
    """Features that were to be measured."""
    mean: Interval | None
    control: Interval | None
    lift: Interval | None
    """Above another feature's explanation, over the features that have both."""
    by_band: Mapping[str, Interval | None]

    def to_json(self) -> dict[str, Any]:
        """Give the summary as JSON values; intervals by name."""
        values = {
            key: value._asdict() if isinstance(value, Interval) else value for key, value in self.__dict__.items()
        }
        bands = {band: found._asdict() for band, found in self.by_band.items() if found is not None}
        return {**values, "by_band": bands}


def summarise_measures(measures: Sequence[Measure], *, seed: int = 0, level: float = 0.95) -> list[MeasureSummary]:
    """Sum measures up, with bootstrap intervals over features.

    Args:
        measures: of all features.
        seed: of the bootstrap.
        level: of the intervals.
    """
    groups = sorted({(one.measurer, one.modality, name) for one in measures for name in one.found.values})
    return [_summary(measures, *group, seed, level) for group in groups]


def _summary(
    measures: Sequence[Measure], measurer: str, modality: ModalityName, name: str, seed: int, level: float
) -> MeasureSummary:
    def interval(values: Sequence[float]) -> Interval | None:
        return bootstrap_mean(values, seed=seed, level=level)

    mine = [one for one in measures if (one.measurer, one.modality) == (measurer, modality)]
    having = [one.found for one in mine if name in one.found.values]
    paired = [
        (one.found.values[name], one.control.values[name])
        for one in mine
        if name in one.found.values and one.control is not None and name in one.control.values
    ]
    bands = sorted({band for one in having for band in one.by_band if name in one.by_band[band]})
    return MeasureSummary(
        measurer=measurer,
        modality=modality,
        value=name,
        n_features=len(mine),
        mean=interval([one.values[name] for one in having]),
        control=interval([control for _, control in paired]),
        lift=interval([found - control for found, control in paired]),
        by_band={
            band: interval([one.by_band[band][name] for one in having if name in one.by_band.get(band, {})])
            for band in bands
        },
    )


def summary_json(measures: Sequence[Measure], *, seed: int = 0) -> dict[str, Any]:
    """Give the sum of measures as JSON values, with what has no numbers and why."""
    notes = [
        {"measurer": measurer, "modality": modality, "note": note, "n_features": count}
        for (measurer, modality, note), count in _notes(measures).items()
    ]
    return {"numbers": [one.to_json() for one in summarise_measures(measures, seed=seed)], "without_numbers": notes}


def measure_lines(measures: Sequence[Measure], *, seed: int = 0) -> list[str]:
    """Write the sum of measures as a Markdown table, and a line for each reason why there are no numbers."""
    lines = []
    summaries = summarise_measures(measures, seed=seed)
    if summaries:
        lines += [
            "| measure | of | number | features | mean | another feature's explanation | lift | by activation |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for one in summaries:
        bands = ", ".join(f"{band} {found.mean:.2f}" for band, found in one.by_band.items() if found is not None)
        features = f"{one.mean.n if one.mean else 0} of {one.n_features}"
        cells = [one.measurer, one.modality, one.value, features, *map(_interval, (one.mean, one.control, one.lift))]
        lines.append(f"| {' | '.join([*cells, bands or '-'])} |")
    for (measurer, modality, note), count in _notes(measures).items():
        lines.append(f"{measurer}, explanations from {modality}: {count} without numbers: {note}")
    return lines


def _notes(measures: Sequence[Measure]) -> dict[tuple[str, ModalityName, str], int]:
    found = Counter((one.measurer, one.modality, one.found.note) for one in measures if one.found.note)
    return dict(sorted(found.items()))


def _interval(found: Interval | None) -> str:
    return "-" if found is None else f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"
