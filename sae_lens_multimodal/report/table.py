"""One Parquet table of everything: a row for each feature, with what was found, said and answered about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from tqdm import tqdm

from sae_lens_multimodal.features.tables import write_tables
from sae_lens_multimodal.report.formats import utf8
from sae_lens_multimodal.report.gather import written_tokens
from sae_lens_multimodal.report.runs import SortedRun
from sae_lens_multimodal.report.table_schema import TABLE

if TYPE_CHECKING:
    from sae_lens_multimodal.autointerp.explanation import Explanation, Shown
    from sae_lens_multimodal.autointerp.judges.base import JudgeFailure
    from sae_lens_multimodal.autointerp.measurer import Measure
    from sae_lens_multimodal.autointerp.results import Score, Verdict
    from sae_lens_multimodal.features.description import FeatureDescription
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.records import Run
    from sae_lens_multimodal.types import Box

ROWS_AT_ONCE = 512
"""Features held in memory at a time."""


def export_table(
    store: FeatureStore,
    output: Path | str,
    *,
    runs: Sequence[Run] = (),
    output_tokens: Mapping[int, Sequence[tuple[str, float]]] | None = None,
    features: Sequence[int] | None = None,
    progress: bool = True,
) -> Path:
    """Write one Parquet table with a row for each feature: statistics, description, explanations, scores, verdicts.

    Args:
        store: what every feature responds to.
        output: the file to write; an existing one is replaced.
        runs: explanations, scores, verdicts and measures, as `read_run` reads them; the label is the first one's.
        output_tokens: tokens that a feature writes towards; None: those of the store's descriptions.
        features: which; None: all of the store, those that never fired included.
        progress: show a bar on stderr.

    Returns:
        The file.

    Raises:
        FeatureError: a feature is not in the store.
    """
    output = Path(output)
    sorted_runs = [SortedRun.of(run) for run in runs]
    chosen = sorted(store.all_features if features is None else set(features))

    def tables() -> Iterator[pa.Table]:
        with tqdm(total=len(chosen), desc="table", unit="feature", disable=not progress) as bar:
            for start in range(0, len(chosen), ROWS_AT_ONCE):
                part = chosen[start : start + ROWS_AT_ONCE]
                rows = [_row(store, feature, sorted_runs, output_tokens or {}) for feature in part]
                yield pa.Table.from_pylist(rows, schema=TABLE)
                bar.update(len(part))

    write_tables(output, TABLE, tables(), rows_per_group=ROWS_AT_ONCE)
    return output


def _row(
    store: FeatureStore,
    feature: int,
    runs: Sequence[SortedRun],
    output_tokens: Mapping[int, Sequence[tuple[str, float]]],
) -> dict[str, Any]:
    """Put a feature's row together; what is not known is null."""
    written = written_tokens(store, feature, output_tokens)
    explanations = [_explanation(run, one) for run in runs for one in run.explanations.get(feature, ())]
    first = next((one for one in explanations if one["text"] and one["run"] == runs[0].run.name), None)
    row = {
        **store.statistics_of(feature),
        "label": None if first is None else first["label"] or first["text"],
        "explanation": None if first is None else first["text"],
        **_described(store.description(feature)),
        "writes": [token for token, _ in written],
        "writes_logit": [value for _, value in written],
        "explanations": explanations,
        "scores": [_score(run, one) for run in runs for one in run.scores.get(feature, ())],
        "measures": [row for run in runs for one in run.measures.get(feature, ()) for row in _measure(run, one)],
        "verdicts": [_verdict(run, one) for run in runs for one in run.verdicts.get(feature, ())],
    }
    cleaned: dict[str, Any] = _cleaned(row)
    return cleaned


def _cleaned(value: Any) -> Any:  # noqa: ANN401 - any value of a table
    """Replace half surrogate pairs, which Arrow refuses."""
    if isinstance(value, str):
        return utf8(value)
    if isinstance(value, dict):
        return {key: _cleaned(one) for key, one in value.items()}
    return [_cleaned(one) for one in value] if isinstance(value, list) else value


def _described(found: FeatureDescription | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {
        "monosemanticity": found.monosemanticity,
        "n_crops": found.n_crops,
        "cross_modal": found.cross_modal,
        "cross_modal_floor": found.cross_modal_floor,
        "n_tokens": found.n_tokens,
        "cofiring": [one.feature for one in found.cofiring],
        "cofiring_share": [one.share for one in found.cofiring],
        "cofiring_lift": [one.lift for one in found.cofiring],
        "neighbours": [one.feature for one in found.neighbours],
        "neighbour_cosine": [one.cosine for one in found.neighbours],
        "neighbour_given": [one.given for one in found.neighbours],
        "neighbour_covers": [one.covers for one in found.neighbours],
        "neighbour_relation": [one.relation for one in found.neighbours],
    }


def _explanation(run: SortedRun, one: Explanation) -> dict[str, Any]:
    return {
        "run": run.run.name,
        "modality": one.modality,
        "text": one.text,
        "label": one.label,
        "status": one.status,
        "judge": one.judge,
        "procedure": one.procedure,
        "prompts": one.prompts,
        "validation": one.validation,
        "candidates": [asdict(each) for each in one.candidates],
        "shown": [_shown(each) for each in one.shown],
        "validated_on": [_shown(each) for each in one.validated_on],
        **_failure(one.failure),
    }


def _shown(one: Shown) -> dict[str, Any]:
    return {
        "prompt_id": one.prompt_id,
        "active": one.active,
        "image": one.image,
        "box": _box(one.box),
        "text": one.text,
    }


def _box(box: Box | None) -> list[float] | None:
    return None if box is None else list(box)


def _failure(failure: JudgeFailure | None) -> dict[str, Any]:
    if failure is None:
        return {}
    return {"failure": failure.kind.value, "failure_message": failure.message, "reply": failure.reply}


def _score(run: SortedRun, one: Score) -> dict[str, Any]:
    strict = one.tpr_by_band_strict
    return {
        **one.to_json(),
        "run": run.run.name,
        "judge": run.run.judge,
        "bands": [
            {"band": band, "tpr": one.tpr_by_band.get(band), "tpr_strict": strict.get(band)}
            for band in sorted({*one.tpr_by_band, *strict})
        ],
    }


def _measure(run: SortedRun, one: Measure) -> Iterator[dict[str, Any]]:
    """Give a row for each number; one without a number where there is none."""
    names: list[str | None] = [*one.found.values] or [None]
    for name in names:
        yield {
            "run": run.run.name,
            "measurer": one.measurer,
            "modality": one.modality,
            "explanation": one.explanation,
            "name": name,
            "value": one.found.values.get(name or ""),
            "control": None if one.control is None else one.control.values.get(name or ""),
            "control_explanation": one.control_explanation,
            "n": one.found.n,
            "n_failed": one.found.n_failed,
            "note": one.found.note,
            "bands": [
                {"band": band, "value": found[name or ""]} for band, found in one.found.by_band.items() if name in found
            ],
        }


def _verdict(run: SortedRun, one: Verdict) -> dict[str, Any]:
    return {
        "run": run.run.name,
        "judge": run.run.judge,
        "scorer": one.scorer,
        "modality": one.modality,
        "control": one.control,
        "position": one.position,
        "explanation": one.explanation,
        "truth": one.truth,
        "answer": one.answer,
        "prompt_id": one.prompt_id,
        "kind": one.kind,
        "quantile": one.quantile,
        "image": one.image,
        "box": _box(one.box),
        "view": None if one.style is None else one.style.view,
        "text": one.text,
        **_failure(one.failure),
    }
