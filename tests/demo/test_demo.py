"""The demo from end to end, small."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.demo.naming import naming_shares
from sae_lens_multimodal.demo.run import run_demo
from sae_lens_multimodal.demo.settings import DemoSettings
from sae_lens_multimodal.demo.steering import SteeringResult, best_features, count_answers, draw_cases
from sae_lens_multimodal.demo.tables import metric_lines
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.scenes.truth import Concept, FeatureTruth, Truth
from sae_lens_multimodal.types import Modality

SMALL = DemoSettings(
    d_sae=64,
    training_tokens=30_000,
    harvest_prompts=60,
    truth_prompts=20,
    evaluation_prompts=16,
    explained_features=6,
    examples_needed=4,
    steered_scenes=2,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "out"
    run_demo(output, settings=SMALL)
    return output


def test_it_leaves_numbers_a_report_and_everything_in_between(demo: Path) -> None:
    metrics = json.loads((demo / "metrics.json").read_text())
    assert metrics["reconstruction"]["image"]["n_tokens"] > 0
    assert sum(metrics["naming"][modality]["asked"] for modality in ("image", "text")) == 6
    assert {one["scorer"] for one in metrics["scores"]} == {"detection", "fuzzing"}
    assert (demo / "report" / "index.html").is_file()
    for part in ("sae/cfg.json", "features/manifest.json", "explanations/explanations.jsonl", "scores/scores.jsonl"):
        assert (demo / part).is_file(), part
    text = "\n".join(metric_lines(metrics))
    assert "explained variance" in text
    assert "other kept" in text


def test_another_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match="holds no demo"):
        run_demo(tmp_path, settings=SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def fit_of(feature: int, value: str, precision: float, modality: Modality = Modality.IMAGE) -> FeatureTruth:
    """A feature that fits a colour in one modality and nothing in the other."""
    concept, nothing = Concept("colour", value), Concept("glyph", "x")
    by_modality = {one: (nothing, 0.0) for one in (Modality.IMAGE, Modality.TEXT)}
    return FeatureTruth(
        feature=feature,
        concept=concept,
        modality=modality,
        average_precision=precision,
        n_active=9,
        by_modality={**by_modality, modality: (concept, precision)},
    )


def truth_of(*fits: FeatureTruth) -> Truth:
    return Truth(features=list(fits), precisions={Modality.IMAGE: np.zeros((4, 1))})


def test_naming_shares_by_hand() -> None:
    truth = truth_of(fit_of(0, "red", 0.9), fit_of(1, "blue", 0.8), fit_of(2, "red", 0.6), fit_of(3, "green", 0.1))
    explanations = [
        Explanation(feature=0, text="red circle"),
        Explanation(feature=1, text="red"),
        Explanation(feature=2, text=""),
        Explanation(feature=3, text="green"),
    ]
    shares = naming_shares(truth, explanations)["image"]
    counts = {name: shares[name] for name in ("asked", "explained", "nothing_in_common", "failed", "clear")}
    assert counts == {"asked": 4, "explained": 3, "nothing_in_common": 1, "failed": 0, "clear": 3}
    assert shares["right"] == pytest.approx(1 / 3)
    # feature 0 given "red" or "": 1 of 2; feature 1 given "red circle" or "": 0 of 2; feature 2: 2 of 2
    assert shares["shuffled"] == pytest.approx(3 / 6)


def test_an_explanation_is_held_against_the_modality_it_was_made_from() -> None:
    truth = truth_of(fit_of(0, "red", 0.9, Modality.TEXT), fit_of(1, "red", 0.9, Modality.IMAGE))
    explanations = [Explanation(feature=0, text="red", modality="image"), Explanation(feature=1, text="red")]
    shares = naming_shares(truth, explanations)
    assert shares["image"]["clear"] == 1  # feature 0 is clear on words only, but was explained from pictures
    assert shares["text"]["asked"] == 0
    assert shares["text"]["right"] is None


def test_cases_lack_the_attribute_and_name_the_exchange() -> None:
    for case in islice(draw_cases(Concept("shape", "star"), first_seed=5), 8):
        assert "star" not in (case.target.shape, case.other.shape)
        assert case.wanted == f"{case.target.colour} {case.target.texture} star"
        assert case.own == Concept("shape", case.target.shape)


def test_answers_are_counted() -> None:
    cases = list(islice(draw_cases(Concept("colour", "red"), first_seed=5), 3))
    first, second, third = cases
    before = [f"{case.target.phrase} , {case.other.phrase}" for case in cases[:2]] + ["nothing"]
    after = [f"{first.other.phrase} , {first.wanted}", f"{second.target.phrase} , red red", third.wanted]
    result = SteeringResult()
    count_answers(result, cases, before, after)
    assert (result.n_cases, result.n_steered, result.n_named, result.n_others_kept) == (3, 2, 2, 1)
    assert SteeringResult().to_json()["success"] is None


def test_the_best_clear_feature_of_each_attribute_is_steered() -> None:
    truth = truth_of(fit_of(4, "red", 0.6), fit_of(5, "red", 0.9), fit_of(6, "blue", 0.4))
    assert best_features(truth) == {Concept("colour", "red"): 5}
