"""Runs side by side: the numbers against a calculation by hand, and the page as a reader uses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select
from sklearn.metrics import cohen_kappa_score

from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.autointerp.measurer import Measure, Measured
from sae_lens_multimodal.autointerp.results import Score, Verdict
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.report.build import build_report
from sae_lens_multimodal.report.compare import compare_runs
from sae_lens_multimodal.report.records import Run
from sae_lens_multimodal.report.runs import SortedRun, measure_tables, score_tables
from tests.report.browsing import show, texts, wait

FEATURES = [2, 3, 5, 8]
OWN, OTHER = (0.5, 0.75, None, 1.0), (0.75, 0.5, 0.9, 1.0)


def verdict(feature: int, position: int, answer: bool | None) -> Verdict:
    return Verdict(
        feature=feature,
        modality="image",
        scorer="detection",
        control=False,
        position=position,
        explanation="x",
        truth=position % 2 == 0,
        answer=answer,
        prompt_id=10 * feature + position,
        kind="top",
        image=0,
        box=None,
        text=None,
        failure=None,
    )


def run(name: str, accuracies: tuple[float | None, ...], answers: str, text: str, iou: float) -> Run:
    given = {"modality": "image", "explanation": "x"}
    return Run(
        name=name,
        explanations=[Explanation(feature=feature, text=f"{text} {feature}") for feature in FEATURES[1:]]
        + [Explanation(feature=FEATURES[0], text="the same")],
        scores=[
            Score(
                feature=feature,
                scorer="detection",
                balanced_accuracy=found,
                control_balanced_accuracy=0.5,
                control_feature=1,
                **given,
            )
            for feature, found in zip(FEATURES, accuracies, strict=True)
        ],
        verdicts=[
            verdict(2 + place // 10, place % 10, {"y": True, "n": False, "-": None}[said])
            for place, said in enumerate(answers)
        ],
        measures=[
            Measure(feature=2, measurer="masks", explanation_digest="", found=Measured(values={"iou": iou}), **given)
        ],
    )


YES, ALSO = "yynny-nnyyynyn", "ynnnyynyy-ynyy"


@pytest.fixture
def pair() -> tuple[SortedRun, SortedRun]:
    own, other = run("one", OWN, YES, "red", 0.25), run("two", OTHER, ALSO, "blue", 0.75)
    return SortedRun.of(own), SortedRun.of(other)


def test_differences_are_those_of_the_features_that_have_both(pair: tuple[SortedRun, SortedRun]) -> None:
    found = compare_runs(*pair, FEATURES)
    rows = {row[0]: list(row[1:]) for row in found.table.rows}
    # 2: +.25, 3: -.25, 8: 0; feature 5 has no score in the first run
    assert rows["detection"][:5] == [3, "0.750", "0.750", 1, 1]
    assert str(rows["detection"][5]).startswith("0.000 (\u22120.250 to 0.250)")
    assert rows["detection over control"][:3] == [3, "0.250", "0.250"]
    assert rows["masks iou"] == [1, "0.250", "0.750", 1, 0, "0.500 (0.500 to 0.500)"]
    assert found.data["numbers"]["detection"] == [[0.5, 0.75, None, 1.0], [0.75, 0.5, 0.9, 1.0]]
    assert found.data["texts"][1] == ["the same", "blue 3", "blue 5", "blue 8"]


def test_intervals_are_over_features(pair: tuple[SortedRun, SortedRun]) -> None:
    """Resampling the three differences by hand, with the same draws."""
    draws = np.random.default_rng(0).integers(3, size=(2000, 3))
    means = np.array([0.25, -0.25, 0.0])[draws].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    (row,) = [one for one in compare_runs(*pair, FEATURES).table.rows if one[0] == "detection"]
    assert row[-1] == f"0.000 ({low:.3f} to {high:.3f})".replace("-", "\u2212")


def test_agreement_of_judges_is_cohens(pair: tuple[SortedRun, SortedRun]) -> None:
    said = [(a, b) for a, b in zip(YES, ALSO, strict=True) if "-" not in (a, b)]
    kappa = cohen_kappa_score([a for a, _ in said], [b for _, b in said])
    first, second = compare_runs(*pair, FEATURES).sentences
    assert first == "4 features are explained in both, 1 of them in the same words; 0 only in one, 0 only in two."
    assert f"Of {len(said)} questions" in second and f"{sum(a == b for a, b in said)}:" in second
    assert f"kappa {kappa:.2f}" in second


def test_runs_that_share_nothing_can_be_compared() -> None:
    found = compare_runs(SortedRun.of(Run(name="a")), SortedRun.of(Run(name="b")), FEATURES)
    assert list(found.table.rows) == []
    assert found.data["numbers"] == {}


def test_summaries_name_the_runs_where_there_are_several(pair: tuple[SortedRun, SortedRun]) -> None:
    (alone,), (together,) = score_tables(pair[:1]), score_tables(pair)
    assert [row[0] for row in alone.rows] == ["detection"]
    assert [row[0] for row in together.rows] == ["one: detection", "two: detection"]
    assert alone.rows[0][1:3] == ["3 of 4", ".75 (.50 to 1.00)"]
    (measured,) = measure_tables(pair)
    assert [row[:3] for row in measured.rows] == [
        ["one: masks iou", 1, "0.250 (0.250 to 0.250)"], ["two: masks iou", 1, "0.750 (0.750 to 0.750)"],
    ]  # fmt: skip
    assert score_tables([SortedRun.of(Run())]) == measure_tables([SortedRun.of(Run())]) == []


def test_runs_need_names_of_their_own(store: FeatureStore, tmp_path: Path) -> None:
    for names in (("", ""), ("a", "a"), ("b", "")):
        with pytest.raises(ConfigError, match="a name of its own"):
            build_report(
                store, output=tmp_path / "x", name=names[0], compare=[Run(name=names[1])], features=[0], progress=False
            )
    index = build_report(store, output=tmp_path / "y", compare=[Run(name="b")], features=[0], progress=False)
    assert "b against this run" in (index.parent / "compare.html").read_text(encoding="utf-8")


def column(browser: Chrome, number: int) -> list[str]:
    return texts(browser, f"#compare-rows td:nth-child({number})")


def test_the_page_sorts_filters_and_leads_on(browser: Chrome, report: Path) -> None:
    show(browser, report, "compare.html")
    wait(browser, "return document.querySelectorAll('#compare-rows tr').length === 5")
    assert Select(browser.find_element(By.ID, "value")).first_selected_option.text == "detection"
    # the other judge says yes to all: .5, where the first one was right throughout, or once wrong
    assert column(browser, 1)[:2] == ["1", "0"]
    assert column(browser, 4)[:2] == [".88", "1.00"]
    assert column(browser, 5)[:2] == [".50", ".50"]
    assert column(browser, 6)[:3] == ["\u2212.38", "\u2212.50", "\u2013"]
    assert "Red shapes." in column(browser, 3) and "not explained" in column(browser, 3)
    Select(browser.find_element(By.ID, "only")).select_by_value("worse")
    assert sorted(column(browser, 1)) == ["0", "1"]
    Select(browser.find_element(By.ID, "value")).select_by_value("masks iou")
    assert column(browser, 1) == [], "0.5 in both"
    Select(browser.find_element(By.ID, "only")).select_by_value("different")
    assert "1" not in column(browser, 1), "the same words"
    browser.find_element(By.ID, "q").send_keys("red shapes")
    assert column(browser, 1) == ["0"]
    assert browser.find_element(By.ID, "tally").text == "1 of 5 features"
    browser.execute_script("document.activeElement.blur()")
    ActionChains(browser).send_keys("j").send_keys(Keys.ENTER).perform()
    assert browser.current_url.endswith("features/0.html")
    assert browser.get_log("browser") == []


def test_heads_sort_both_ways(browser: Chrome, report: Path) -> None:
    show(browser, report, "compare.html")
    wait(browser, "return document.querySelectorAll('#compare-rows tr').length === 5")
    for wanted in (["0", "1", "2", "3", "7"], ["7", "3", "2", "1", "0"]):
        browser.find_element(By.CSS_SELECTOR, "#compare-head th button").click()
        assert column(browser, 1) == wanted


def test_a_features_page_has_all_runs(browser: Chrome, report: Path) -> None:
    show(browser, report, "features/0.html")
    rows = dict(zip(texts(browser, ".runs tbody th"), texts(browser, ".runs tbody td:last-child"), strict=True))
    assert rows["from images"] == "Red shapes."
    assert rows["detection"] == ".50 (.50)"
    assert rows["masks iou"] == "0.5 (0.2)"
    heads = texts(browser, "[id^=verdicts]")
    assert len(heads) == 2 and "judge" in heads[1]
    assert texts(browser, ".candidates .kept th") == ["Red shapes. (kept)"]
    sources = texts(browser, "#negatives") and texts(browser, ".strip-of p")
    assert any(one.startswith("shown to the explainer") for one in sources)
    assert any(one.startswith("its candidates tried on") for one in sources)
    assert texts(browser, "#measures ~ .scroll tbody tr:first-child td")[:4] == ["0.5", "0.2", "0.1", "0.4"]
    show(browser, report, "features/2.html")
    assert any("no masks" in one for one in texts(browser, ".numbers .note"))
