"""Scoring: a judge who sees scores high, a blind one at chance; nothing leaks; failures count."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sae_lens_multimodal.autointerp.explain import explain
from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.judges import FailureKind, JudgeFailure, JudgeRequest, ScriptedJudge
from sae_lens_multimodal.autointerp.results import Score, read_scores, read_verdicts, score_of, summarise
from sae_lens_multimodal.autointerp.score import score
from sae_lens_multimodal.autointerp.scorers import SCORERS, Sampling
from sae_lens_multimodal.autointerp.selection import check_disjoint, held_out
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.errors import ConfigError, JudgeError, SelectionError, StoreError
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book
from tests.autointerp.sample import COLOURS, blind, perfect

BOOK = scenes_prompt_book()


@pytest.fixture(scope="module")
def explanations(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> list[Explanation]:
    output = tmp_path_factory.mktemp("explained") / "out"
    return explain(store, ScriptedJudge(perfect), output=output, prompts=BOOK, n_examples=4, progress=False)


def run(
    store: FeatureStore, explanations: list[Explanation], output: Path, judge: ScriptedJudge, **options: object
) -> list[Score]:
    return score(
        store,
        judge,
        explanations,
        output=output,
        progress=False,
        **{"prompts": BOOK, **options},  # type: ignore[arg-type]
    )


def test_a_judge_who_sees_scores_high_and_the_control_does_not(
    store: FeatureStore, explanations: list[Explanation], tmp_path: Path
) -> None:
    scores = run(store, explanations, tmp_path / "out", ScriptedJudge(perfect))
    assert [(one.feature, one.scorer) for one in scores] == [
        (feature, scorer) for feature in range(5) for scorer in ("detection", "fuzzing")
    ]
    for one in scores:
        assert one.balanced_accuracy is not None
        assert one.balanced_accuracy >= 0.9, one
        assert one.control_explanation != one.explanation
        assert one.n == 10
    for found in summarise(scores):
        assert found.lift is not None
        assert found.lift.mean > 0.2, found
        if found.modality == "image":
            assert found.lift.low > 0.1


def test_a_judge_who_does_not_look_scores_chance(
    store: FeatureStore, explanations: list[Explanation], tmp_path: Path
) -> None:
    for one in run(store, explanations, tmp_path / "out", ScriptedJudge(blind)):
        assert (one.balanced_accuracy, one.tpr, one.fpr, one.lift) == (0.5, 1.0, 1.0, 0.0)


def test_wrong_explanations_score_chance(store: FeatureStore, explanations: list[Explanation], tmp_path: Path) -> None:
    turned = [
        Explanation(**{**one.__dict__, "text": COLOURS[(one.feature + 1) % len(COLOURS)]})
        for one in explanations
        if one.modality == "image"
    ]
    scores = run(store, turned, tmp_path / "out", ScriptedJudge(perfect))
    assert np.mean([one.balanced_accuracy for one in scores if one.balanced_accuracy is not None]) < 0.65


def test_no_prompt_and_no_picture_is_seen_by_both(
    store: FeatureStore, explanations: list[Explanation], tmp_path: Path
) -> None:
    run(store, explanations, tmp_path / "out", ScriptedJudge(perfect))
    by_feature = {one.feature: one for one in explanations}
    verdicts = read_verdicts(tmp_path / "out")
    assert len(verdicts) == 5 * 2 * 2 * 10
    for verdict in verdicts:
        seen = by_feature[verdict.feature]
        assert verdict.prompt_id not in seen.prompt_ids
        assert set(store.prompt(verdict.prompt_id).image_ids).isdisjoint(seen.image_ids)


def test_leaks_are_refused(store: FeatureStore) -> None:
    example = store.examples(0, "top", "image")[0]
    with pytest.raises(SelectionError, match="the explainer saw it"):
        check_disjoint([example], prompts=[example.prompt_id], images=[])
    with pytest.raises(SelectionError, match="the explainer saw picture"):
        check_disjoint([example], prompts=[], images=example.image_ids)
    check_disjoint([example], prompts=[example.prompt_id + 1], images=["other"])


def test_a_shared_picture_counts_as_seen(store: FeatureStore) -> None:
    rng = np.random.default_rng(0)
    every = held_out(store, 0, "image", prompts=[], images=[], rng=rng)
    taken = every.firing[0]
    left = held_out(store, 0, "image", prompts=[], images=taken.image_ids, rng=rng)
    assert taken.prompt_id not in {one.prompt_id for one in left.firing}
    assert len(left.firing) == len(every.firing) - 1


def test_verdicts_say_what_was_shown(store: FeatureStore, explanations: list[Explanation], tmp_path: Path) -> None:
    run(store, explanations, tmp_path / "out", ScriptedJudge(perfect))
    verdicts = read_verdicts(tmp_path / "out")
    for verdict in verdicts:
        assert (verdict.image is None) == (verdict.modality == "text")
        assert (verdict.box is None) == (verdict.modality == "text" or verdict.scorer == "detection")
        assert (verdict.style is None) == (verdict.box is None)
        assert verdict.style is None or verdict.style.margin_pixels is not None
        assert (verdict.text is not None) == (verdict.modality == "text")
        if verdict.scorer == "detection":
            assert verdict.truth == (verdict.kind != "silent")
    own = [one for one in verdicts if not one.control]
    control = [one for one in verdicts if one.control]
    shown = [(one.feature, one.scorer, one.position, one.truth, one.prompt_id, one.box, one.text) for one in own]
    assert [(c.feature, c.scorer, c.position, c.truth, c.prompt_id, c.box, c.text) for c in control] == shown


def test_truth_cannot_be_read_off_the_order(
    store: FeatureStore, explanations: list[Explanation], tmp_path: Path
) -> None:
    run(store, explanations, tmp_path / "out", ScriptedJudge(perfect))
    first = Counter(one.truth for one in read_verdicts(tmp_path / "out") if one.position < 5 and not one.control)
    assert 0.25 < first[True] / first.total() < 0.75


def test_both_kinds_of_fuzzing_item_come_from_the_same_pictures(
    store: FeatureStore, explanations: list[Explanation], tmp_path: Path
) -> None:
    run(store, explanations, tmp_path / "out", ScriptedJudge(perfect), scorers=["fuzzing"])
    for feature in range(5):
        mine = [one for one in read_verdicts(tmp_path / "out") if one.feature == feature and not one.control]
        right, wrong = ([one for one in mine if one.truth is truth] for truth in (True, False))
        assert Counter(one.prompt_id for one in right) == Counter(one.prompt_id for one in wrong)
        sizes = {one.prompt_id: one.box.area for one in right if one.box}
        for one in wrong:
            if one.box:
                assert one.box.area == pytest.approx(sizes[one.prompt_id], rel=1e-3)


def test_failures_count_both_as_missing_and_as_wrong(
    store: FeatureStore, explanations: list[Explanation], tmp_path: Path
) -> None:
    asked = Counter[str]()

    def sometimes(request: JudgeRequest) -> str | JudgeFailure:
        asked["all"] += 1
        if asked["all"] % 4 == 0:
            return JudgeFailure.of(request, FailureKind.TIMEOUT, "late")
        return "perhaps" if asked["all"] % 4 == 1 else perfect(request)

    scores = run(store, explanations, tmp_path / "out", ScriptedJudge(sometimes))
    kinds = Counter(one.failure.kind for one in read_verdicts(tmp_path / "out") if one.failure)
    assert kinds == {FailureKind.TIMEOUT: 50, FailureKind.UNPARSABLE: 50}
    assert sum(one.n_failed + one.control_n_failed for one in scores) == 100
    for one in scores:
        assert one.balanced_accuracy_strict is not None
        assert one.balanced_accuracy_strict < 0.8
        assert one.balanced_accuracy is None or one.balanced_accuracy >= 0.75
    kept = next(one for one in read_verdicts(tmp_path / "out") if one.failure and one.failure.reply)
    assert kept.failure is not None
    assert kept.failure.reply == "perhaps"
    assert kept.answer is None
    for found in summarise(scores):
        assert found.n_failed == sum(one.n_failed for one in scores if _group(one) == (found.scorer, found.modality))


def _group(one: Score) -> tuple[str, str]:
    return one.scorer, one.modality


def test_features_without_explanation_are_counted_against_the_strict_lift(
    store: FeatureStore, explanations: list[Explanation], tmp_path: Path
) -> None:
    mixed = [Explanation(**{**one.__dict__, "text": ""}) if one.feature in (0, 1) else one for one in explanations]
    scores = run(store, mixed, tmp_path / "out", ScriptedJudge(perfect), scorers=["detection"])
    assert [one.note for one in scores[:2]] == ["the explainer found nothing in common"] * 2
    assert scores[0].n == 0
    images = next(one for one in summarise(scores) if one.modality == "image")
    assert (images.n_features, images.n_scored, images.n_unexplained) == (4, 2, 2)
    assert images.lift is not None
    assert images.lift_strict is not None
    assert images.lift_strict.mean == pytest.approx(images.lift.mean / 2)


def test_explanation_without_words_in_the_book_is_not_asked(
    store: FeatureStore, explanations: list[Explanation], tmp_path: Path
) -> None:
    strange = [Explanation(**{**explanations[0].__dict__, "text": "wheels"}), explanations[1]]
    scores = run(store, strange, tmp_path / "out", ScriptedJudge(perfect), scorers=["detection"])
    assert scores[0].balanced_accuracy is None
    assert scores[0].n_not_asked == 10
    assert scores[0].note == "the prompt book has no words for this explanation"
    assert scores[1].control_balanced_accuracy is None


def test_goes_on_after_the_judge_went_down(
    store: FeatureStore, explanations: list[Explanation], tmp_path: Path
) -> None:
    count = Counter[str]()

    def dies(request: JudgeRequest) -> str:
        count["all"] += 1
        if count["all"] > 50:
            raise JudgeError("down")
        return perfect(request)

    with pytest.raises(JudgeError):
        run(store, explanations, tmp_path / "out", ScriptedJudge(dies))
    assert len(read_scores(tmp_path / "out")) == 2
    with (tmp_path / "out" / "verdicts.jsonl").open("a") as file:
        stray = json.dumps({**read_verdicts(tmp_path / "out")[0].to_json(), "feature": 3})
        file.write(f'{stray}\n{{"feature": 4, "torn')
    judge = ScriptedJudge(perfect)
    resumed = run(store, explanations, tmp_path / "out", judge)
    assert len(judge.requests) == 160
    assert resumed == run(store, explanations, tmp_path / "whole", ScriptedJudge(perfect))
    assert len(read_verdicts(tmp_path / "out")) == 200
    assert read_verdicts(tmp_path / "out") == read_verdicts(tmp_path / "whole")


def test_scores_grow_with_the_explanations(
    store: FeatureStore, explanations: list[Explanation], tmp_path: Path
) -> None:
    first = run(store, explanations[:2], tmp_path / "out", ScriptedJudge(perfect))
    judge = ScriptedJudge(perfect)
    grown = run(store, explanations, tmp_path / "out", judge)
    assert grown[:4] == first, "kept with the control that was drawn then"
    # the text feature stands alone in its modality, so its control is one of images
    assert len(judge.requests) == 3 * 2 * 2 * 10
    assert len(read_verdicts(tmp_path / "out")) == 5 * 2 * 2 * 10
    judge = ScriptedJudge([])
    assert run(store, explanations[3:], tmp_path / "out", judge) == grown[6:]
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert sum(one["n_features"] for one in written) == 10, "the summary is that of all scores of the folder"


def test_what_had_no_explanation_or_no_control_is_tested_once_it_has(
    store: FeatureStore, explanations: list[Explanation], tmp_path: Path
) -> None:
    wordless = Explanation(**{**explanations[1].__dict__, "text": ""})
    before = run(store, [explanations[0], wordless], tmp_path / "out", ScriptedJudge(perfect))
    assert [one.control_feature for one in before] == [None] * 4
    after = run(store, explanations[:2], tmp_path / "out", ScriptedJudge(perfect))
    assert [one.control_feature for one in after] == [1, 1, 0, 0]
    assert sorted(map(str, read_scores(tmp_path / "out"))) == sorted(map(str, after))
    assert len(read_verdicts(tmp_path / "out")) == 2 * 2 * 2 * 10


def test_other_explanations_or_settings_are_refused(
    store: FeatureStore, explanations: list[Explanation], tmp_path: Path
) -> None:
    run(store, explanations, tmp_path / "out", ScriptedJudge(perfect))
    other = Explanation(**{**explanations[0].__dict__, "text": "blue"})
    with pytest.raises(StoreError, match=r"another explanation of feature 0 from image: 'red', now 'blue'"):
        run(store, [other], tmp_path / "out", ScriptedJudge(perfect))
    assert len(read_scores(tmp_path / "out")) == 10
    with pytest.raises(StoreError, match=r"other settings.*seed was 0, now 1"):
        run(store, explanations, tmp_path / "out", ScriptedJudge(perfect), seed=1)


def test_no_scores_yet_is_not_an_error(store: FeatureStore, explanations: list[Explanation], tmp_path: Path) -> None:
    with pytest.raises(JudgeError):
        run(store, explanations, tmp_path / "out", ScriptedJudge([]))
    assert read_scores(tmp_path / "out") == []
    assert read_verdicts(tmp_path / "out") == []
    for read in (read_scores, read_verdicts):
        with pytest.raises(StoreError, match=r"has no manifest\.json"):
            read(tmp_path)


def test_ledger_is_written(store: FeatureStore, explanations: list[Explanation], tmp_path: Path) -> None:
    for _ in range(2):
        run(store, explanations, tmp_path / "out", ScriptedJudge(perfect))
    assert json.loads((tmp_path / "out" / "ledger.json").read_text())["calls"] == 200


def test_judge_can_be_shown_heat_maps(store: FeatureStore, explanations: list[Explanation], tmp_path: Path) -> None:
    judge = ScriptedJudge(lambda _: '{"answer": "yes"}')
    book = GeneralPrompts(fuzz_style=RegionStyle(view="heat"))
    run(store, explanations[:1], tmp_path / "out", judge, prompts=book, scorers=["fuzzing"])
    lit = []
    for verdict, request in zip(read_verdicts(tmp_path / "out"), judge.requests, strict=True):
        assert verdict.box is not None
        assert verdict.style is not None
        assert verdict.style.view == "heat"
        shown = np.asarray(request.pictures[0]).astype(int)
        x0, y0, x1, y1 = (round(value) for value in verdict.box)
        tint = shown[..., 0] - shown[..., 2]
        lit.append(tint[y0:y1, x0:x1].mean() > tint.mean() + 20)
    assert all(lit), "wrong regions are lit like right ones"


def test_summary_is_written(store: FeatureStore, explanations: list[Explanation], tmp_path: Path) -> None:
    scores = run(store, explanations, tmp_path / "out", ScriptedJudge(perfect))
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written == [one.to_json() for one in summarise(scores)]
    assert set(written[0]["lift"]) == {"mean", "low", "high", "n"}
    assert read_scores(tmp_path / "out") == scores


def test_without_control(store: FeatureStore, explanations: list[Explanation], tmp_path: Path) -> None:
    judge = ScriptedJudge(perfect)
    scores = run(store, explanations, tmp_path / "out", judge, control=False)
    assert len(judge.requests) == 100
    assert all(one.lift is None for one in scores)
    assert summarise(scores)[0].lift_strict is None


def test_bad_settings(store: FeatureStore, explanations: list[Explanation], tmp_path: Path) -> None:
    judge = ScriptedJudge(perfect)
    with pytest.raises(ConfigError, match="expected some of detection, detection_crop, fuzzing"):
        run(store, explanations, tmp_path / "a", judge, scorers=["simulation"])
    with pytest.raises(ConfigError, match="n_positive"):
        run(store, explanations, tmp_path / "a", judge, sampling=Sampling(n_positive=0))
    with pytest.raises(ConfigError, match="feature 0 is explained from image twice"):
        run(store, [explanations[0]] * 2, tmp_path / "a", judge)


def test_scorers_are_registered_under_their_names() -> None:
    assert {name: scorer.name for name, scorer in SCORERS.items()} == {
        name: name for name in ("detection", "detection_crop", "fuzzing", "fuzzing_joint")
    }


def test_what_fails_of_a_control_does_not_speak_for_the_explanation(
    store: FeatureStore, explanations: list[Explanation], tmp_path: Path
) -> None:
    run(store, explanations[:2], tmp_path / "out", ScriptedJudge(perfect))
    first = explanations[0].feature
    verdicts = [one for one in read_verdicts(tmp_path / "out") if (one.feature, one.scorer) == (first, "detection")]
    failure = JudgeFailure(kind=FailureKind.REFUSED, message="no", digest="0", prompt="?")
    refused = [
        replace(one, answer=None, failure=failure) if one.control else replace(one, answer=True) for one in verdicts
    ]
    found = score_of(
        feature=first,
        modality="image",
        scorer="detection",
        explanation="x",
        control=(2, "y"),
        verdicts=refused,
        n_not_asked=0,
    )
    assert found.balanced_accuracy_strict == 0.5
    assert found.lift_strict == -0.5
