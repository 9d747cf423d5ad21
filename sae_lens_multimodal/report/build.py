"""Building the report's folder: pages, pictures, style and scripts, put in place in one step."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from sae_lens_multimodal.errors import FeatureError, StoreError
from sae_lens_multimodal.files import MANIFEST_NAME, read_json, write_manifest, write_text
from sae_lens_multimodal.report.assets import FOLDER as ASSETS_FOLDER
from sae_lens_multimodal.report.assets import Assets
from sae_lens_multimodal.report.calibrated import calibration_table
from sae_lens_multimodal.report.gather import Findings, fact_views, feature_views, table_view
from sae_lens_multimodal.report.judged import score_names
from sae_lens_multimodal.report.render import STATIC_FILES, index_row, render_feature, render_index, static_text
from sae_lens_multimodal.report.view import ReportView

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.explanation import Explanation
    from sae_lens_multimodal.autointerp.results import Score, Verdict
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.records import SteeringRecord, SummaryTable

REPORT_KIND = "report"
SCHEMA_VERSION = 1
_OURS = frozenset({MANIFEST_NAME, "index.html", "features", "static", ASSETS_FOLDER})

_R = TypeVar("_R", "Explanation", "Score", "Verdict")


def build_report(
    store: FeatureStore,
    *,
    output: Path | str,
    explanations: Iterable[Explanation] | None = None,
    scores: Iterable[Score] | None = None,
    verdicts: Iterable[Verdict] | None = None,
    steering: Mapping[int, Sequence[SteeringRecord]] | None = None,
    output_tokens: Mapping[int, Sequence[tuple[str, float]]] | None = None,
    summary: Sequence[SummaryTable] | None = None,
    calibrations: Sequence[Mapping[str, Any]] | None = None,
    title: str = "Features",
    features: Sequence[int] | None = None,
    max_examples: int = 16,
    progress: bool = True,
) -> Path:
    """Write a folder that opens in a browser from disk, without a network.

    Args:
        store: what every feature responds to.
        output: the folder to write. One that holds an earlier report is replaced once the new one is complete.
        explanations: what the features were said to respond to.
        scores: how well that fits.
        verdicts: every answer of the judge behind the scores.
        steering: answers before and after, by feature.
        output_tokens: tokens that a feature writes towards and the effect on their logits, strongest first, by feature.
        summary: small tables for the head of the index.
        calibrations: of the judges, as `Calibration.to_json` or `read_calibration` give them; they lead the index.
        title: of the report.
        features: those that get a page; None: all that were ever active.
        max_examples: examples of each kind and modality on a page.
        progress: show a progress bar.

    Returns:
        The report's `index.html`.

    Raises:
        StoreError: the folder holds something that is not a report of this package.
        FeatureError: a feature is not in the store.
    """
    output = Path(output).resolve()
    _check_output(output)
    chosen = _chosen(store, features)
    findings = Findings(
        explanations=_by_feature(explanations or ()),
        scores=_by_feature(scores or ()),
        verdicts=_by_feature(verdicts or ()),
        steering=steering or {},
        output_tokens=output_tokens or {},
    )
    report = ReportView(
        title=title,
        facts=fact_views(store, len(store.features)),
        tables=tuple(table_view(one) for one in (*map(calibration_table, calibrations or ()), *(summary or ()))),
        n_features=len(chosen),
        score_names=score_names(
            (score for feature in chosen for score in findings.scores.get(feature, ())), findings.score_modalities
        ),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.", ignore_cleanup_errors=True) as name:
        building = Path(name) / "report"
        _write(store, building, report, chosen, findings, max_examples=max_examples, progress=progress)
        if output.exists():
            output.rename(Path(name) / "replaced")
        building.rename(output)
    return output / "index.html"


def _write(
    store: FeatureStore,
    folder: Path,
    report: ReportView,
    features: Sequence[int],
    findings: Findings,
    *,
    max_examples: int,
    progress: bool,
) -> None:
    """Fill a folder with a whole report."""
    rows: list[dict[str, Any]] = []
    (folder / "features").mkdir(parents=True)
    views = feature_views(store, features, findings, Assets(folder), max_examples=max_examples)
    for view in tqdm(views, total=len(features), desc="report", unit="page", disable=not progress):
        (folder / view.url).write_text(render_feature(report, view), encoding="utf-8")
        rows.append(index_row(view))
    write_text(folder / "index.html", render_index(report, rows, sort=_first_order(report)))
    for name in STATIC_FILES:
        write_text(folder / "static" / name, static_text(name))
    settings = {"title": report.title, "n_features": len(features), "hook_name": store.hook_name}
    write_manifest(folder, kind=REPORT_KIND, schema_version=SCHEMA_VERSION, settings=settings)


def _first_order(report: ReportView) -> str:
    """Begin with the features that are explained best, where there are scores."""
    return f"score:{report.score_names[0]}" if report.score_names else "index"


def _chosen(store: FeatureStore, features: Sequence[int] | None) -> list[int]:
    if features is None:
        return list(store.features)
    known = set(store.all_features)
    unknown = [feature for feature in features if feature not in known]
    if unknown:
        raise FeatureError(f"features {unknown[:5]} are not in {store.folder}; it holds {len(known)} features.")
    return sorted(set(features))


def _by_feature(records: Iterable[_R]) -> dict[int, list[_R]]:
    grouped: dict[int, list[_R]] = defaultdict(list)
    for record in records:
        grouped[record.feature].append(record)
    return grouped


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
