"""Building the report's folder: pages, pictures, style and scripts, put in place in one step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sae_lens_multimodal.errors import ConfigError, FeatureError, StoreError
from sae_lens_multimodal.files import MANIFEST_NAME, read_json, write_manifest
from sae_lens_multimodal.report.assets import FOLDER as ASSETS_FOLDER
from sae_lens_multimodal.report.calibrated import calibration_table
from sae_lens_multimodal.report.compare import compare_runs
from sae_lens_multimodal.report.gather import Findings, Limits, Links, fact_views, table_view
from sae_lens_multimodal.report.index_data import IndexData
from sae_lens_multimodal.report.judged import measure_names, score_names
from sae_lens_multimodal.report.pages import Pages, write_pages
from sae_lens_multimodal.report.records import Run
from sae_lens_multimodal.report.render import (
    STATIC_FILES,
    render_comparison,
    render_index,
    static_text,
)
from sae_lens_multimodal.report.runs import SortedRun, measure_tables, score_tables
from sae_lens_multimodal.report.script_data import FOLDER as DATA_FOLDER
from sae_lens_multimodal.report.script_data import write_page, write_script
from sae_lens_multimodal.report.view import ComparisonView, ReportView

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.explanation import Explanation
    from sae_lens_multimodal.autointerp.measurer import Measure
    from sae_lens_multimodal.autointerp.prompts import PromptBook
    from sae_lens_multimodal.autointerp.results import Score, Verdict
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.records import SteeringRecord, SummaryTable

REPORT_KIND = "report"
SCHEMA_VERSION = 2
OWN_NAME = "this run"
"""What the report's own run is called where there are others and it has no name."""
_OURS = frozenset({MANIFEST_NAME, "index.html", "compare.html", "features", "static", ASSETS_FOLDER, DATA_FOLDER})


def build_report(
    store: FeatureStore,
    *,
    output: Path | str,
    explanations: Iterable[Explanation] | None = None,
    scores: Iterable[Score] | None = None,
    verdicts: Iterable[Verdict] | None = None,
    measures: Iterable[Measure] | None = None,
    judge: str = "",
    prompts: PromptBook | None = None,
    name: str = "",
    compare: Sequence[Run] = (),
    steering: Mapping[int, Sequence[SteeringRecord]] | None = None,
    output_tokens: Mapping[int, Sequence[tuple[str, float]]] | None = None,
    summary: Sequence[SummaryTable] | None = None,
    calibrations: Sequence[Mapping[str, Any]] | None = None,
    title: str = "Features",
    features: Sequence[int] | None = None,
    max_examples: int = 16,
    max_negatives: int = 8,
    workers: int = 1,
    progress: bool = True,
) -> Path:
    """Write a folder that opens in a browser from disk, without a network.

    Args:
        store: what every feature responds to.
        output: the folder to write. One that holds an earlier report is replaced once the new one is complete.
        explanations: what the features were said to respond to.
        scores: how well that fits.
        verdicts: every answer of the judge behind the scores.
        measures: numbers without a verdict, as `measure` gives them.
        judge: who gave the verdicts.
        prompts: the phrases that the judge was asked with; with them each question is shown word for word.
        name: what this run of explaining and judging is called beside others.
        compare: other runs over the same features: other explainers, procedures or judges. Their explanations, scores
            and verdicts are on the features' pages, too, and a page of its own sets each against this run.
        steering: answers before and after, by feature.
        output_tokens: tokens that a feature writes towards and the effect on their logits, strongest first, by feature.
        summary: small tables for the head of the index.
        calibrations: of the judges, as `Calibration.to_json` or `read_calibration` give them; they lead the index.
        title: of the report.
        features: those that get a page; None: all that were ever active.
        max_examples: examples of each kind and modality on a page.
        max_negatives: hard negatives on a page.
        workers: processes that make pages; with more than one, a script needs `if __name__ == "__main__":`.
        progress: show a progress bar, with pages a second and the time left.

    Returns:
        The report's `index.html`.

    Raises:
        ConfigError: two runs have the same name, or one to be compared has none.
        StoreError: the folder holds something that is not a report of this package.
        FeatureError: a feature is not in the store.
    """
    output = Path(output).resolve()
    _check_output(output)
    own = Run(
        name=name or (OWN_NAME if compare else ""),
        explanations=list(explanations or ()),
        scores=list(scores or ()),
        verdicts=list(verdicts or ()),
        measures=list(measures or ()),
        judge=judge,
        prompts=prompts,
    )
    _check_names([own, *compare])
    chosen = _chosen(store, features)
    findings = Findings(
        runs=[SortedRun.of(run) for run in (own, *compare)], steering=steering or {}, output_tokens=output_tokens or {}
    )
    tables = (*map(calibration_table, calibrations or ()), *(summary or ()))
    report = _report_view(store, title, tables, chosen, findings)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=output.parent, prefix=f".{output.name}.", ignore_cleanup_errors=True
    ) as folder:
        building = Path(folder) / "report"
        limits = Limits(max_examples=max_examples, max_negatives=max_negatives)
        _write(store, building, report, chosen, findings, limits, workers=workers, progress=progress)
        if output.exists():
            output.rename(Path(folder) / "replaced")
        building.rename(output)
    return output / "index.html"


def _check_names(runs: Sequence[Run]) -> None:
    names = [run.name for run in runs]
    if len(runs) > 1 and ("" in names or len(set(names)) < len(names)):
        raise ConfigError(f"the runs to be compared are called {names}; give each a name of its own.")


def _report_view(
    store: FeatureStore,
    title: str,
    tables: Sequence[SummaryTable],
    chosen: Sequence[int],
    findings: Findings,
) -> ReportView:
    own = findings.own
    scores = [score for feature in chosen for score in own.scores.get(feature, ())]
    measures = [measure for feature in chosen for measure in own.measures.get(feature, ())]
    judged = (*score_tables(findings.runs), *measure_tables(findings.runs))
    return ReportView(
        title=title,
        facts=fact_views(store, len(store.features)),
        tables=tuple(map(table_view, (*tables, *judged))),
        score_names=score_names(scores, own.score_modalities),
        measure_names=measure_names(measures, own.measure_modalities),
        compared=len(findings.runs) > 1,
    )


def _write(
    store: FeatureStore,
    folder: Path,
    report: ReportView,
    features: Sequence[int],
    findings: Findings,
    limits: Limits,
    *,
    workers: int,
    progress: bool,
) -> None:
    """Fill a folder with a whole report."""
    (folder / "features").mkdir(parents=True)
    index = IndexData(folder, report, sort=_first_order(report))
    pages = Pages(folder=folder, report=report, links=Links.of(features, findings), limits=limits)
    entries = write_pages(store, pages, features, findings, workers=workers)
    for entry in tqdm(entries, total=len(features), desc="report", unit="page", disable=not progress):
        index.add(entry)
    index.finish()
    write_page(folder / "index.html", render_index(report))
    if report.compared:
        write_page(folder / "compare.html", render_comparison(report, _comparisons(folder, features, findings)))
    (folder / "static").mkdir()
    for name in STATIC_FILES:
        write_page(folder / "static" / name, static_text(name))
    settings = {"title": report.title, "n_features": len(features), "hook_name": store.hook_name}
    write_manifest(folder, kind=REPORT_KIND, schema_version=SCHEMA_VERSION, settings=settings)


def _comparisons(folder: Path, features: Sequence[int], findings: Findings) -> list[ComparisonView]:
    """Set each other run against the report's own, and write what the page needs."""
    views = []
    for number, other in enumerate(findings.runs[1:]):
        found = compare_runs(findings.own, other, features)
        url = f"{DATA_FOLDER}/compare-{number}.js"
        write_script(folder / url, "reportCompare", number, found.data)
        views.append(
            ComparisonView(name=other.run.name, url=url, table=table_view(found.table), sentences=found.sentences)
        )
    return views


def _first_order(report: ReportView) -> str:
    """Begin with the features that are explained best, where there are scores."""
    return f"value:{report.score_names[0]}" if report.score_names else "index"


def _chosen(store: FeatureStore, features: Sequence[int] | None) -> list[int]:
    if features is None:
        return list(store.features)
    known = set(store.all_features)
    unknown = [feature for feature in features if feature not in known]
    if unknown:
        raise FeatureError(f"features {unknown[:5]} are not in {store.folder}; it holds {len(known)} features.")
    return sorted(set(features))


def _check_output(output: Path) -> None:
    """See that nothing of the user's own would be replaced.

    Raises:
        StoreError: the folder is not empty and holds something that no report of ours has.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise StoreError(f"{output} is a file; give a folder for the report.")
    found = {entry.name for entry in output.iterdir()}
    if not found:
        return
    if MANIFEST_NAME not in found:
        raise StoreError(f"{output} is not empty and holds no report; give a new folder for the report.")
    manifest = read_json(output / MANIFEST_NAME)
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    if kind != REPORT_KIND:
        raise StoreError(f"{output} holds a {kind!r}, not a report; give a new folder for the report.")
    strangers = sorted(found - _OURS)
    if strangers:
        raise StoreError(f"{output} holds {strangers[0]!r}, which no report has; move it away or give a new folder.")
