"""Calibration: a judge who sees, one who says yes, one who reads the box, one who tosses a coin."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from sae_lens_multimodal.autointerp.calibration import (
    Calibration,
    PlantedFeature,
    agreement,
    calibrate,
)
from sae_lens_multimodal.autointerp.calibration_text import calibration_lines
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.judges import (
    FailureKind,
    JudgeFailure,
    JudgeReply,
    JudgeRequest,
    ReplyToken,
    ScriptedJudge,
)
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.scenes.planted import planted_features
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book
from sae_lens_multimodal.scenes.render import COLOUR_RGB
from tests.autointerp.sample import perfect, seen_colours

PLANTED = planted_features(8, n_regions=2, kinds=("colour",))
BOOK = scenes_prompt_book()


def run(answer: Callable[[JudgeRequest], str | JudgeFailure], book: object = BOOK) -> Calibration:
    return calibrate(ScriptedJudge(answer), PLANTED, book, progress=False)  # type: ignore[arg-type]


def by_condition(found: Calibration) -> dict[str, float]:
    return {one.condition: one.balanced_accuracy.mean for one in found.conditions if one.balanced_accuracy}


def asked_colour(request: JudgeRequest) -> str:
    return next(colour for colour in COLOUR_RGB if f"Description: {colour}\n" in request.text)


def test_planted_regions_show_what_they_say() -> None:
    for feature in PLANTED:
        for region in feature.regions:
            box = tuple(round(value) for value in region.box)
            assert feature.concept in seen_colours(region.picture.crop(box), share=0.1)  # type: ignore[arg-type]
            assert feature.other not in seen_colours(region.picture, share=0.005)
            blank = region.blanked().picture.crop(box)  # type: ignore[arg-type]
            assert feature.concept not in seen_colours(blank)
    assert len({region.picture.tobytes() for one in PLANTED for region in one.regions}) == 16


def test_a_judge_who_sees_is_right_and_falls_to_chance_without_the_picture() -> None:
    found = run(perfect)
    accuracy = by_condition(found)
    assert accuracy["region"] == 1.0
    assert accuracy["picture"] >= 0.9
    for condition in ("black", "swapped", "blank box"):
        assert accuracy[condition] <= 0.6, condition
    assert [one.is_at_chance for one in found.conditions if one.condition in ("black", "blank box")] == [True, True]
    assert found.calibration_error == 0
    assert found.explained_right is not None
    assert found.explained_right >= 0.7
    assert found.flip_rate is None, "this book offers no answers to reorder"
    assert "NOT at chance" not in "\n".join(calibration_lines(found))
    assert json.loads(json.dumps(found.to_json()))["conditions"][0]["balanced_accuracy"]["mean"] == 1.0


def test_a_judge_who_says_yes_is_at_chance_everywhere() -> None:
    found = run(lambda request: perfect(request) if request.choices is None else "yes")
    assert set(by_condition(found).values()) == {0.5}
    region = found.conditions[0]
    assert (region.tpr, region.fpr, region.yes_rate) == (1.0, 1.0, 1.0)
    assert found.calibration_error == 0.5


def test_a_judge_who_knows_the_answer_without_looking_is_found_out() -> None:
    telling = [dataclasses.replace(one, other="star") for one in PLANTED]
    judge = ScriptedJudge(lambda r: "nothing" if r.choices is None else "no" if "star" in str(r.parts[-1]) else "yes")
    found = calibrate(judge, telling, BOOK, progress=False)
    assert by_condition(found)["black"] == 1.0
    assert "NOT at chance without the picture: black" in "\n".join(calibration_lines(found))


def test_a_judge_that_says_how_sure_it_is_is_taken_at_its_word() -> None:
    """Nine times out of ten sure of what is right, and as sure of the wrong where it is wrong."""
    turn = iter(range(10_000))

    def says(request: JudgeRequest) -> str | JudgeReply:
        answer = perfect(request)
        if not request.top_log_probabilities:
            return answer
        if next(turn) % 4 == 0:
            answer = {"yes": "no", "no": "yes"}[answer]
        other = {"yes": "no", "no": "yes"}[answer]
        top = ((answer, math.log(0.9)), (other, math.log(0.1)))
        token = ReplyToken(token=answer, log_probability=math.log(0.9), top=top)
        return JudgeReply(text=answer, log_probabilities=(token,))

    judge = ScriptedJudge(says)
    found = calibrate(judge, PLANTED, BOOK, progress=False)
    region = found.conditions[0]
    assert found.confidence == "probabilities"
    assert sum(bool(one.top_log_probabilities) for one in judge.requests) == region.n
    assert region.tpr is not None and region.fpr is not None
    # in each of the two bins: said .9 (or .1), is what it is
    yes, no = region.tpr + region.fpr, 2 - region.tpr - region.fpr
    expected = (yes * abs(0.9 - region.tpr / yes) + no * abs(0.1 - (1 - region.tpr) / no)) / 2
    assert found.calibration_error == pytest.approx(expected)
    assert "(of the probabilities it gives)" in "\n".join(calibration_lines(found))
    assert run(perfect).confidence == "crops"


def test_the_order_of_the_answers_is_tried() -> None:
    def first_offered(request: JudgeRequest) -> str:
        if "share" in request.text:
            return '{"common": false}'
        return "yes" if request.text.index('"yes"') < request.text.index('"no"') else "no"

    assert run(first_offered, GeneralPrompts()).flip_rate == 1.0

    def seeing(request: JudgeRequest) -> str:
        if "share" in request.text:
            return '{"common": false}'
        return "yes" if asked_colour(request) in seen_colours(request.pictures[0]) else "no"

    found = run(seeing, GeneralPrompts())
    assert found.flip_rate == 0.0
    assert found.explained_right == 0.0
    assert GeneralPrompts().reordered().version != GeneralPrompts().version
    assert GeneralPrompts().reordered().reordered() == GeneralPrompts()


def test_the_order_of_the_regions_is_tried() -> None:
    turn = iter(range(1000))
    words = ("red", "blue")

    def fickle(request: JudgeRequest) -> str:
        return words[next(turn) % 2] if request.choices is None else "no"

    assert run(fickle).explanation_flip_rate == 1.0
    assert run(lambda r: "red" if r.choices is None else "no").explanation_flip_rate == 0.0


def test_failures_are_counted_both_ways() -> None:
    turn = iter(range(10_000))

    def torn(request: JudgeRequest) -> str | JudgeFailure:
        if next(turn) % 2:
            return JudgeFailure.of(request, FailureKind.TIMEOUT, "late")
        return perfect(request)

    region = run(torn).conditions[0]
    assert 0 < region.n_failed < region.n
    assert region.balanced_accuracy is None or region.balanced_accuracy.mean == 1.0
    assert region.balanced_accuracy_strict is not None
    assert region.balanced_accuracy_strict.mean == pytest.approx(1 - region.n_failed / region.n)


def test_agreement_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.random(50) < 0.6, rng.random(50) < 0.4
    keys = [str(number) for number in range(50)]
    mine = dict(zip(keys, left.tolist(), strict=True)), dict(zip(keys, right.tolist(), strict=True))
    assert agreement(*mine) == pytest.approx(cohen_kappa_score(left, right))
    assert agreement({"a": None}, {"a": True}) is None
    assert agreement({"a": True}, {"a": True}) == 1.0


def test_too_little_to_calibrate_with_is_refused() -> None:
    with pytest.raises(ConfigError, match="two concepts"):
        calibrate(ScriptedJudge([]), PLANTED[:1], BOOK)
    bare = PlantedFeature(concept="red", other="blue", regions=())
    with pytest.raises(ConfigError, match="each with a region"):
        calibrate(ScriptedJudge([]), [*PLANTED, bare], BOOK)
