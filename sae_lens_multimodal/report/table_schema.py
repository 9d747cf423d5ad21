"""The columns of the table of everything, as `TABLE.md` beside this file describes them."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from sae_lens_multimodal.features.schema import DESCRIBED, STATISTICS


def _struct(**fields: pa.DataType) -> pa.DataType:
    return pa.struct([pa.field(name, kind) for name, kind in fields.items()])


_BOX = pa.list_(pa.float32())
_SHOWN = _struct(prompt_id=pa.int64(), active=pa.bool_(), image=pa.int32(), box=_BOX, text=pa.string())
_CANDIDATE = _struct(
    text=pa.string(),
    label=pa.string(),
    validation=pa.float64(),
    confirmation=pa.float64(),
    n=pa.int32(),
    n_failed=pa.int32(),
    round=pa.int32(),
)
_FAILURE = {"failure": pa.string(), "failure_message": pa.string(), "reply": pa.string()}

EXPLANATION: Mapping[str, pa.DataType] = {
    "run": pa.string(),
    "modality": pa.string(),
    "text": pa.string(),
    "label": pa.string(),
    "status": pa.string(),
    "judge": pa.string(),
    "procedure": pa.string(),
    "prompts": pa.string(),
    "validation": pa.float64(),
    "candidates": pa.list_(_CANDIDATE),
    "shown": pa.list_(_SHOWN),
    "validated_on": pa.list_(_SHOWN),
    **_FAILURE,
}
SCORE: Mapping[str, pa.DataType] = {
    "run": pa.string(),
    "judge": pa.string(),
    "scorer": pa.string(),
    "modality": pa.string(),
    "explanation": pa.string(),
    "note": pa.string(),
    "balanced_accuracy": pa.float64(),
    "balanced_accuracy_strict": pa.float64(),
    "tpr": pa.float64(),
    "fpr": pa.float64(),
    "n": pa.int32(),
    "n_failed": pa.int32(),
    "n_not_asked": pa.int32(),
    "control_feature": pa.int32(),
    "control_explanation": pa.string(),
    "control_balanced_accuracy": pa.float64(),
    "control_balanced_accuracy_strict": pa.float64(),
    "control_n_failed": pa.int32(),
    "lift": pa.float64(),
    "lift_strict": pa.float64(),
    "bands": pa.list_(_struct(band=pa.string(), tpr=pa.float64(), tpr_strict=pa.float64())),
}
MEASURE: Mapping[str, pa.DataType] = {
    "run": pa.string(),
    "measurer": pa.string(),
    "modality": pa.string(),
    "explanation": pa.string(),
    "name": pa.string(),
    "value": pa.float64(),
    "control": pa.float64(),
    "control_explanation": pa.string(),
    "n": pa.int32(),
    "n_failed": pa.int32(),
    "note": pa.string(),
    "bands": pa.list_(_struct(band=pa.string(), value=pa.float64())),
}
VERDICT: Mapping[str, pa.DataType] = {
    "run": pa.string(),
    "judge": pa.string(),
    "scorer": pa.string(),
    "modality": pa.string(),
    "control": pa.bool_(),
    "position": pa.int32(),
    "explanation": pa.string(),
    "truth": pa.bool_(),
    "answer": pa.bool_(),
    "prompt_id": pa.int64(),
    "kind": pa.string(),
    "quantile": pa.float64(),
    "image": pa.int32(),
    "box": _BOX,
    "view": pa.string(),
    "text": pa.string(),
    **_FAILURE,
}
LISTS: Mapping[str, Mapping[str, pa.DataType]] = {
    "explanations": EXPLANATION,
    "scores": SCORE,
    "measures": MEASURE,
    "verdicts": VERDICT,
}
_DESCRIBED = [column for column in DESCRIBED if column.name != "feature"]

TABLE = pa.schema(
    [
        *STATISTICS,
        pa.field("label", pa.string()),
        pa.field("explanation", pa.string()),
        *_DESCRIBED,
        *(pa.field(name, pa.list_(_struct(**fields))) for name, fields in LISTS.items()),
    ]
)
