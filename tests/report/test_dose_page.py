"""The page of dose curves: points where they belong, nothing of a curve's text taken for markup."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_lens_multimodal.errors import ConfigError, StoreError
from sae_lens_multimodal.files import read_json
from sae_lens_multimodal.hooks.dose_curve import DoseCurve, DosePoint
from sae_lens_multimodal.report.dose import HEIGHT, WIDTH, build_dose_report, dose_view


def curve(name: str = "feature 12", *, guard: bool = True) -> DoseCurve:
    def point(strength: float, target: float, side: float) -> DosePoint:
        return DosePoint(
            strength=strength,
            value=2 * strength,
            target=target,
            others_kl=side / 2,
            guard_kl=side if guard else None,
            guard_changed=side if guard else None,
            answers=("red", "<b>"),
        )

    points = (point(4, 1.0, 0.8), point(0, 0.25, 0.0), point(2, 0.5, 0.05))
    return DoseCurve(
        points=points,
        baseline=0.25,
        name=name,
        feature=12,
        unit=2.0,
        target="red",
        n_prompts=2,
        n_guard=1 if guard else 0,
    )


def test_points_lie_where_they_were_measured() -> None:
    view = dose_view(curve())
    target, side = view.charts
    # By strength, whatever the order in which they were measured.
    assert [(dot.x, dot.y) for dot in target.dots] == [(0, 0.75 * HEIGHT), (WIDTH / 2, 0.5 * HEIGHT), (WIDTH, 0)]
    assert [dot.chosen for dot in target.dots] == [False, True, False]
    assert [dot.y for dot in side.dots] == pytest.approx([HEIGHT, HEIGHT * (1 - 0.05 / 0.8), 0], abs=0.01)
    assert target.baseline == 0.75 * HEIGHT
    assert [tick.label for tick in target.x_ticks] == ["0", "1", "2", "3", "4"]
    assert "guard" not in dose_view(curve(guard=False)).charts[1].caption


def test_the_page_opens_from_disk_and_escapes(tmp_path: Path) -> None:
    page = build_dose_report([curve("<script>alert(1)</script>"), curve(guard=False)], output=tmp_path / "doses")
    html = page.read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;" in html
    assert "<b>" not in html
    assert html.count("<svg") == 4
    assert "http://" not in html
    assert "https://" not in html
    assert [DoseCurve.from_dict(one) for one in read_json(tmp_path / "doses" / "dose.json")][1] == curve(guard=False)
    again = build_dose_report([curve()], output=tmp_path / "doses")
    assert again.read_text(encoding="utf-8").count("<svg") == 2


def test_nothing_of_the_users_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="no page of dose curves"):
        build_dose_report([curve()], output=tmp_path)
    with pytest.raises(StoreError, match="is a file"):
        build_dose_report([curve()], output=tmp_path / "mine.txt")
    with pytest.raises(ConfigError, match="no dose curves"):
        build_dose_report([], output=tmp_path / "new")
