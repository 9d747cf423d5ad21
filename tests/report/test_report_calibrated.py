"""A report begins with how far its judges can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sae_lens_multimodal.autointerp.calibration import Calibration, ConditionResult
from sae_lens_multimodal.autointerp.metrics import Interval
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.files import write_json
from sae_lens_multimodal.report.build import build_report
from sae_lens_multimodal.report.calibrated import calibration_table, read_calibration
from sae_lens_multimodal.report.records import SummaryTable
from tests.report.report_sample import EVIL


def calibration(black: float) -> Calibration:
    def result(condition: Any, mean: float) -> ConditionResult:
        interval = Interval(mean, mean - 0.05, mean + 0.05, 12)
        return ConditionResult(
            condition=condition,
            tpr=0.9,
            fpr=0.25,
            balanced_accuracy=interval,
            balanced_accuracy_strict=interval,
            yes_rate=0.6,
            n=40,
            n_failed=2,
        )

    return Calibration(
        judge=f"judge {EVIL}",
        prompts="general",
        n_features=12,
        conditions=(result("region", 0.83), result("black", black)),
        calibration_error=0.07,
        flip_rate=None,
        explanation_flip_rate=0.1,
        explained_right=0.75,
        n_not_asked=0,
    )


def test_the_table_says_what_the_calibration_found() -> None:
    table = calibration_table(calibration(0.5).to_json())
    assert list(table.rows[0]) == ["region", ".90", ".25", ".60", ".83 (.78 to .88)", ".83 (.78 to .88)", "2 of 40"]
    assert table.rows[1][0] == "black (should be at chance)"
    assert "error .07" in table.note and "answers \u2013" in table.note and "right .75" in table.note
    assert "do not trust" not in table.note
    assert "Not at chance without the picture: black" in calibration_table(calibration(0.7).to_json()).note


def test_the_report_begins_with_it(store: FeatureStore, tmp_path: Path) -> None:
    write_json(tmp_path / "judge" / "calibration.json", calibration(0.7).to_json())
    other = SummaryTable(caption="Something else", columns=("a",), rows=[("b",)])
    index = build_report(
        store,
        output=tmp_path / "report",
        features=[0],
        summary=[other],
        calibrations=[read_calibration(tmp_path / "judge")],
        progress=False,
    )
    page = index.read_text(encoding="utf-8")
    assert page.index("How far the judge can be trusted") < page.index("Something else")
    assert "do not trust the scores" in page and EVIL not in page


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"judge": "a"})
    with pytest.raises(StoreError, match=r"x\.json is no calibration"):
        read_calibration(tmp_path / "x.json")
