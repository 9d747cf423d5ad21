"""An evaluation as lines of text and as a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.files import MANIFEST_NAME, write_atomically, write_json, write_manifest
from sae_lens_multimodal.training.evaluation import Evaluation
from sae_lens_multimodal.training.splice import MEAN, PLACES, ZERO

KIND = "evaluation"
SCHEMA_VERSION = 1
NUMBERS_NAME = "evaluation.json"
FEATURES_NAME = "features.parquet"

_COLUMNS = {
    "explained_variance": "EV",
    "normalised_mse": "NMSE",
    "cosine": "cosine",
    "l0": "L0",
    "l1": "L1",
    "dead_share": "dead",
    "dense_share": "dense",
    "n_tokens": "tokens",
}


def evaluation_lines(found: Evaluation) -> list[str]:
    """Three tables in Markdown: reconstruction, losses, and which modality features are about."""
    return [*_reconstruction(found), "", *_losses(found), *_features(found)]


def _reconstruction(found: Evaluation) -> list[str]:
    rows: list[Sequence[object]] = [("reconstruction", "tokens of", *_COLUMNS.values())]
    for name, by_modality in found.reconstruction.items():
        for modality, values in by_modality.items():
            rows.append((name, modality, *(_number(values[column]) for column in _COLUMNS)))
    return _table(rows)


def _losses(found: Evaluation) -> list[str]:
    if not found.losses:
        return []
    columns = ("spliced in", "at tokens", "CE", "CE without", "recovered (zero)", "recovered (mean)", "KL", "targets")
    rows: list[Sequence[object]] = [columns]
    for name in (*found.reconstruction, ZERO, MEAN):
        for place in PLACES:
            values = found.losses[place]
            if not values["n_targets"]:
                continue
            one = values[name]
            recovered = [_number(one.get(f"recovered_from_{floor}")) for floor in (ZERO, MEAN)]
            shown = (_number(one["ce"]), _number(values["ce"]), *recovered, _number(one["kl"]))
            rows.append((f"{name} ablation" if name in (ZERO, MEAN) else name, place, *shown, values["n_targets"]))
    return [*_table(rows), ""]


def _features(found: Evaluation) -> list[str]:
    counts = found.features.summary()
    score = found.features.modality_score
    score = score[~np.isnan(score)]
    middle = int(((score > 0.1) & (score < 0.9)).sum())
    return [
        f"features that fire on image tokens only {counts['image_only']}, on text tokens only {counts['text_only']}, "
        f"on both {counts['both']}, on neither {counts['neither']}; modality score between .1 and .9: {middle}"
    ]


def save_evaluation(found: Evaluation, folder: Path) -> Path:
    """Write `evaluation.json` and, for every feature, `features.parquet`.

    Raises:
        StoreError: the folder holds something else than an earlier evaluation.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / NUMBERS_NAME).is_file():
        raise StoreError(f"{folder} holds other files than an evaluation; give another folder.")
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    write_json(folder / NUMBERS_NAME, found.to_json())
    table = feature_table(found)
    write_atomically(folder / FEATURES_NAME, lambda path: pq.write_table(table, path))
    write_manifest(folder, kind=KIND, schema_version=SCHEMA_VERSION, settings=found.origin)
    return folder


def feature_table(found: Evaluation) -> pa.Table:
    """One row a feature: `density` and `mean` activation by modality, `modality_score` (null: it never fires)."""
    use = found.features
    score = use.modality_score
    columns: dict[str, Any] = {"feature": np.arange(len(score), dtype=np.int32)}
    for modality in use.density:
        columns[f"density_{modality}"] = use.density[modality]
        columns[f"mean_{modality}"] = use.mean[modality]
    columns["modality_score"] = pa.array(score, mask=np.isnan(score))
    return pa.table(columns)


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _table(rows: Sequence[Sequence[object]]) -> list[str]:
    header, *body = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in (header, *body)) for column in range(len(header))]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in (header, *body)
    ]
    return [lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]]
