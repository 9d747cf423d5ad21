"""The demo from end to end, small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.demo.naming import naming_shares
from sae_lens_multimodal.demo.run import run_demo
from sae_lens_multimodal.demo.settings import DemoSettings
from sae_lens_multimodal.demo.tables import metric_lines
from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.scenes.truth import Concept, FeatureTruth, Truth
from sae_lens_multimodal.types import Modality

SMALL = DemoSettings(
    d_sae=128,
    training_tokens=40_000,
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
    assert metrics["naming"]["explained"] == 6
    assert {one["scorer"] for one in metrics["scores"]} == {"detection", "fuzzing"}
    assert (demo / "report" / "index.html").is_file()
    for part in ("sae/cfg.json", "features/manifest.json", "explanations/explanations.jsonl", "scores/scores.jsonl"):
        assert (demo / part).is_file(), part
    text = "\n".join(metric_lines(metrics))
    assert "explained variance" in text
    assert "others kept" in text


def test_another_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match="holds no demo"):
        run_demo(tmp_path, settings=SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_naming_shares_by_hand() -> None:
    def fit(feature: int, value: str, precision: float) -> FeatureTruth:
        concept = Concept("colour", value)
        return FeatureTruth(
            feature=feature,
            concept=concept,
            modality=Modality.IMAGE,
            average_precision=precision,
            n_active=9,
            by_modality={Modality.IMAGE: (concept, precision)},
        )

    truth = Truth(
        features=[fit(0, "red", 0.9), fit(1, "blue", 0.8), fit(2, "red", 0.6), fit(3, "green", 0.1)],
        precisions={Modality.IMAGE: np.zeros((4, 1))},
    )
    explanations = [
        Explanation(feature=0, text="red circle"),
        Explanation(feature=1, text="red"),
        Explanation(feature=2, text=""),
        Explanation(feature=3, text="green"),
    ]
    shares = naming_shares(truth, explanations)
    assert shares["explained"] == 4
    assert shares["clear"] == 3
    assert shares["right"] == pytest.approx(1 / 3)
    # feature 0 given "red" or "": 1 of 2; feature 1 given "red circle" or "": 0 of 2; feature 2: 2 of 2
    assert shares["shuffled"] == pytest.approx(3 / 6)
