"""Two runs side by side: which explains better, by how much, and on which features they differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_lens_multimodal.autointerp.calibration import agreement
from sae_lens_multimodal.autointerp.metrics import bootstrap_mean
from sae_lens_multimodal.report.formats import cell
from sae_lens_multimodal.report.index_data import rounded
from sae_lens_multimodal.report.judged import number_name, score_name
from sae_lens_multimodal.report.records import SummaryTable
from sae_lens_multimodal.report.runs import spelt

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.results import Verdict
    from sae_lens_multimodal.report.records import Cell
    from sae_lens_multimodal.report.runs import SortedRun

COLUMNS = ("number", "features", "better", "worse", "difference")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Another run beside the report's own, feature by feature."""

    table: SummaryTable
    """Every number that both have: means, how often it is better and worse, and the mean difference."""
    sentences: tuple[str, ...]
    """How far the explanations and the verdicts agree."""
    data: dict[str, Any]
    """The same by feature, as JSON values."""


def compare_runs(own: SortedRun, other: SortedRun, features: Sequence[int], *, seed: int = 0) -> Comparison:
    """Compare two runs over the same features.

    Every difference is that of the other run less the report's own, over the features for which both have the number,
    with a bootstrap interval over these features.

    Args:
        own: the report's own run.
        other: the other one.
        features: those that have a page.
        seed: of the bootstrap.
    """
    left, right = ({feature: _numbers(run, feature) for feature in features} for run in (own, other))
    names = list(dict.fromkeys(name for side in (left, right) for found in side.values() for name in found))
    pairs = {name: [(left[one].get(name), right[one].get(name)) for one in features] for name in names}
    shared = [name for name in names if any(a is not None and b is not None for a, b in pairs[name])]
    return Comparison(
        table=_table(own.run.name, other.run.name, {name: pairs[name] for name in shared}, seed),
        sentences=tuple(_sentences(own, other, features)),
        data={
            "names": [own.run.name, other.run.name],
            "index": list(features),
            "texts": [[_said(run, one) for one in features] for run in (own, other)],
            "numbers": {
                name: [[rounded(a) for a, _ in pairs[name]], [rounded(b) for _, b in pairs[name]]] for name in shared
            },
        },
    )


def _numbers(run: SortedRun, feature: int) -> dict[str, float]:
    """Give all numbers of a feature by name, scores as they are and lifts over their controls."""
    found = {}
    for score in run.scores.get(feature, ()):
        name = score_name(score.scorer, score.modality, run.score_modalities)
        if score.balanced_accuracy is not None:
            found[name] = score.balanced_accuracy
        if score.lift is not None:
            found[f"{name} over control"] = score.lift
    for measure in run.measures.get(feature, ()):
        for value, number in measure.found.values.items():
            found[number_name(measure.measurer, measure.modality, value, run.measure_modalities)] = number
    return found


def _table(own: str, other: str, pairs: dict[str, list[tuple[float | None, float | None]]], seed: int) -> SummaryTable:
    rows: list[list[Cell]] = []
    for name, both in pairs.items():
        known = [(a, b) for a, b in both if a is not None and b is not None]
        differences = [b - a for a, b in known]
        n = len(known)
        rows.append(
            [
                name,
                n,
                cell(sum(a for a, _ in known) / n),
                cell(sum(b for _, b in known) / n),
                sum(difference > 0 for difference in differences),
                sum(difference < 0 for difference in differences),
                spelt(bootstrap_mean(differences, seed=seed)),
            ]
        )
    return SummaryTable(
        caption=f"{other} against {own}",
        columns=("number", "features", own, other, "better", "worse", "difference"),
        rows=rows,
        note=f"Means over the features that have the number in both; better and worse: features on which {other} is "
        f"above and below {own}; the mean difference with its 95% bootstrap interval over features.",
    )


def _sentences(own: SortedRun, other: SortedRun, features: Sequence[int]) -> Iterator[str]:
    both = [(_said(own, one), _said(other, one)) for one in features]
    explained = [(a, b) for a, b in both if a and b]
    same = sum(a == b for a, b in explained)
    yield (
        f"{len(explained)} features are explained in both, {same} of them in the same words; "
        f"{sum(bool(a) and not b for a, b in both)} only in {own.run.name}, "
        f"{sum(bool(b) and not a for a, b in both)} only in {other.run.name}."
    )
    left, right = _answers(own), _answers(other)
    asked = left.keys() & right.keys()
    kappa = agreement(left, right)
    if kappa is not None:
        known = [(left[one], right[one]) for one in asked if left[one] is not None and right[one] is not None]
        alike = sum(a == b for a, b in known)
        yield (
            f"Of {len(known)} questions that both judges answered with the same words about the same item, they gave "
            f"the same answer to {alike}: Cohen's kappa {kappa:.2f}."
        )


def _answers(run: SortedRun) -> dict[str, bool | None]:
    """Give every answer by what was asked about with which words."""
    return {_asked(one): one.answer for one in run.run.verdicts}


def _asked(one: Verdict) -> str:
    item = (one.prompt_id, one.image, one.box, one.text)
    return repr((one.feature, one.modality, one.scorer, one.control, one.explanation, item))


def _said(run: SortedRun, feature: int) -> str:
    """What a feature was explained as, from images first; "" where it was not."""
    found = sorted(run.explanations.get(feature, ()), key=lambda one: one.modality)
    return "; ".join(one.text for one in found if one.text)
