"""Runs of explainers and judges: read from their folders, sorted by feature, and summed up for the index."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sae_lens_multimodal.autointerp.explanation import KIND as EXPLANATIONS_KIND
from sae_lens_multimodal.autointerp.explanation import read_explanations
from sae_lens_multimodal.autointerp.measure_summary import summarise_measures
from sae_lens_multimodal.autointerp.measures import KIND as MEASURES_KIND
from sae_lens_multimodal.autointerp.measures import read_measures
from sae_lens_multimodal.autointerp.results import KIND as SCORES_KIND
from sae_lens_multimodal.autointerp.results import read_scores, read_verdicts, summarise
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.files import MANIFEST_NAME, read_json
from sae_lens_multimodal.report.formats import cell, score
from sae_lens_multimodal.report.judged import number_name, score_name
from sae_lens_multimodal.report.records import Cell, Run, SummaryTable

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.explanation import Explanation
    from sae_lens_multimodal.autointerp.measurer import Measure
    from sae_lens_multimodal.autointerp.metrics import Interval
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.results import Score, Verdict
    from sae_lens_multimodal.features.store import FeatureStore

_R = TypeVar("_R", "Explanation", "Score", "Verdict", "Measure")


@dataclass(frozen=True, kw_only=True)
class SortedRun:
    """A run's records by feature."""

    run: Run
    explanations: Mapping[int, Sequence[Explanation]]
    scores: Mapping[int, Sequence[Score]]
    verdicts: Mapping[int, Sequence[Verdict]]
    measures: Mapping[int, Sequence[Measure]]
    score_modalities: frozenset[str]
    """Modalities that any feature was scored on: they are part of the scores' names where there are several."""
    measure_modalities: frozenset[str]

    @classmethod
    def of(cls, run: Run) -> SortedRun:
        """Sort a run's records."""
        return cls(
            run=run,
            explanations=_by_feature(run.explanations),
            scores=_by_feature(run.scores),
            verdicts=_by_feature(run.verdicts),
            measures=_by_feature(run.measures),
            score_modalities=frozenset(one.modality for one in run.scores),
            measure_modalities=frozenset(one.modality for one in run.measures),
        )

    def only(self, feature: int) -> SortedRun:
        """Give the records of one feature alone."""
        run = self.run
        return replace(
            self,
            run=Run(name=run.name, judge=run.judge, prompts=run.prompts),
            explanations={feature: self.explanations.get(feature, ())},
            scores={feature: self.scores.get(feature, ())},
            verdicts={feature: self.verdicts.get(feature, ())},
            measures={feature: self.measures.get(feature, ())},
        )


def _by_feature(records: Iterable[_R]) -> dict[int, list[_R]]:
    grouped: dict[int, list[_R]] = defaultdict(list)
    for record in records:
        grouped[record.feature].append(record)
    return dict(grouped)


def read_run(
    folders: Iterable[Path | str],
    *,
    name: str = "",
    store: FeatureStore | None = None,
    books: Sequence[PromptBook] = (),
) -> Run:
    """Read what `explain`, `score` and `measure` wrote.

    Args:
        folders: their folders, a folder that holds such folders, or a JSONL file of explanations.
        name: what pages call the run.
        store: refuse results of another SAE or hook than this store's; None: do not look.
        books: prompt books; the one that the judge was asked with, if it is among them, tells what it was asked.

    Raises:
        StoreError: a folder holds nothing of the kind, or results of another SAE or hook.
    """
    found = [part for folder in folders for part in _parts(Path(folder))]
    explanations: list[Explanation] = []
    scores: list[Score] = []
    verdicts: list[Verdict] = []
    measures: list[Measure] = []
    judge, prompts = "", None
    for part in found:
        settings = _settings(part, store)
        kind = _kind(part)
        if kind == EXPLANATIONS_KIND:
            explanations += read_explanations(part)
        elif kind == MEASURES_KIND:
            measures += read_measures(part)
        else:
            scores += read_scores(part)
            verdicts += read_verdicts(part)
            judge = str(settings.get("judge", ""))
            prompts = next((book for book in books if book.version == settings.get("prompts")), None)
    return Run(
        name=name,
        explanations=explanations,
        scores=scores,
        verdicts=verdicts,
        measures=measures,
        judge=judge,
        prompts=prompts,
    )


_KINDS = (EXPLANATIONS_KIND, SCORES_KIND, MEASURES_KIND)


def _kind(path: Path) -> str:
    """Say what a folder holds; a file holds explanations, and so does a folder without a manifest."""
    if path.is_file():
        return EXPLANATIONS_KIND
    file = path / MANIFEST_NAME
    manifest = read_json(file) if file.is_file() else {}
    return str(manifest.get("kind", "")) if isinstance(manifest, dict) else ""


def _parts(path: Path) -> list[Path]:
    if not path.exists():
        raise StoreError(f"{path} does not exist; expected what `explain`, `score` or `measure` wrote.")
    if _kind(path) in _KINDS:
        return [path]
    inside = [one for one in sorted(path.iterdir()) if one.is_dir() and _kind(one) in _KINDS] if path.is_dir() else []
    if not inside:
        raise StoreError(
            f"{path} holds no explanations, scores or measures; expected a folder that `explain`, `score` or `measure` "
            "wrote, or one with such folders in it."
        )
    return inside


def _settings(path: Path, store: FeatureStore | None) -> dict[str, Any]:
    """Read how results were made, and see that they are of the store's SAE."""
    if path.is_file():
        return {}
    settings: dict[str, Any] = read_json(path / MANIFEST_NAME).get("settings", {})
    made = settings.get("store")
    if store is not None and isinstance(made, dict):
        known = {"hook_name": store.hook_name, "d_sae": store.d_sae}
        other = {key: made.get(key) for key in known}
        if other != known:
            raise StoreError(f"{path} holds results of {other}; the store is of {known}: its features are others.")
    return settings


def score_tables(runs: Sequence[SortedRun]) -> list[SummaryTable]:
    """Sum up the scores of all runs, with bootstrap intervals over features; no table where there are none."""
    several = len(runs) > 1
    rows: list[list[Cell]] = []
    for one in runs:
        for found in summarise(one.run.scores):
            if not found.n_scored and not found.n_verdicts and found.n_unexplained < found.n_features:
                continue  # a scorer that does not work on this modality
            name = score_name(found.scorer, found.modality, one.score_modalities)
            rows.append(
                [
                    f"{one.run.name}: {name}" if several else name,
                    f"{found.n_scored} of {found.n_features}",
                    spelt(found.balanced_accuracy, score),
                    spelt(found.control_balanced_accuracy, score),
                    spelt(found.lift, score),
                    spelt(found.lift_strict, score),
                    f"{found.n_failed} of {found.n_verdicts}",
                ]
            )
    if not rows:
        return []
    return [
        SummaryTable(
            caption="Judged explanations (balanced accuracy, chance 0.5)",
            columns=("test", "features", "score", "control", "lift", "strict lift", "failed"),
            rows=rows,
            note="Means over features, with 95% bootstrap intervals. Control: asked with another feature's "
            "explanation. Strict: over all features, with failures and missing explanations against them.",
        )
    ]


def measure_tables(runs: Sequence[SortedRun]) -> list[SummaryTable]:
    """Sum up the measures of all runs; no table where there are none."""
    several = len(runs) > 1
    rows: list[list[Cell]] = []
    for one in runs:
        for found in summarise_measures(one.run.measures):
            name = number_name(found.measurer, found.modality, found.value, one.measure_modalities)
            rows.append(
                [
                    f"{one.run.name}: {name}" if several else name,
                    0 if found.mean is None else found.mean.n,
                    spelt(found.mean),
                    spelt(found.control),
                    spelt(found.lift),
                ]
            )
    if not rows:
        return []
    return [
        SummaryTable(
            caption="Measured explanations",
            columns=("number", "features", "value", "control", "lift"),
            rows=rows,
            note="Means over features, with 95% bootstrap intervals. Control: with another feature's explanation. "
            "A name that ends in “_strict” counts failures as wrong; one that ends in “_floor” is of something random.",
        )
    ]


def spelt(interval: Interval | None, spell: Callable[[float], str] = cell) -> str | None:
    """Spell a mean with its interval.

    Example:
        >>> from sae_lens_multimodal.autointerp.metrics import Interval
        >>> spelt(Interval(0.5, 0.25, 0.75, 4)), spelt(Interval(0.5, 0.25, 0.75, 4), score)
        ('0.500 (0.250 to 0.750)', '.50 (.25 to .75)')
    """
    if interval is None:
        return None
    # a difference of equal numbers may be a hair off zero
    mean, low, high = (spell(round(value, 9)) for value in interval[:3])
    return f"{mean} ({low} to {high})"
