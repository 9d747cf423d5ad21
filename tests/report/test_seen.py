"""What the report shows of a verdict against what the judge was really sent: the same pixels, the same words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sae_lens_multimodal.adapters.model import load_model
from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.judges import JudgeRequest, ScriptedJudge
from sae_lens_multimodal.autointerp.results import Verdict, read_verdicts
from sae_lens_multimodal.autointerp.score import score
from sae_lens_multimodal.autointerp.scorers import SCORERS
from sae_lens_multimodal.autointerp.styles import VIEWS, RegionStyle, View
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.report.assets import MAX_SIDE, Assets
from sae_lens_multimodal.report.seen import Redrawing, question
from sae_lens_multimodal.report.verdicts import verdict_groups
from sae_lens_multimodal.scenes import model_folder
from tests.autointerp.sample import TEXT_FEATURE, write_store

FEATURES = (0, 1)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Features on the real layout of the tiny model, tiles included."""
    return write_store(tmp_path_factory.mktemp("known") / "store", load_model(model_folder()))


def judged(store: FeatureStore, folder: Path, view: View) -> tuple[list[Verdict], list[JudgeRequest], GeneralPrompts]:
    """Score with a judge that keeps all that it is asked, and that says yes, no, or nothing of use."""
    book = GeneralPrompts(fuzz_style=RegionStyle(view=view, min_side_pixels=40))
    judge = ScriptedJudge(lambda request: ("yes", "no", "perhaps")[int(request.digest, 16) % 3])
    found = [Explanation(feature=feature, text=f"thing {feature}") for feature in FEATURES]
    found.append(Explanation(feature=TEXT_FEATURE, text="a word", modality="text"))
    score(store, judge, found, output=folder, prompts=book, scorers=list(SCORERS), progress=False)
    return read_verdicts(folder), judge.requests, book


def same(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> bool:
    return len(one) == len(other) and all(
        a.size == b.size and (np.asarray(a) == np.asarray(b)).all() for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("view", VIEWS)
def test_every_picture_and_question_is_what_the_judge_was_sent(known: FeatureStore, tmp_path: Path, view: View) -> None:
    verdicts, requests, book = judged(known, tmp_path, view)
    assert len(verdicts) == len(requests) > 60
    assert {one.scorer for one in verdicts} == set(SCORERS) - {"fuzzing_joint"}, "no feature fires in both modalities"
    left = list(requests)
    for feature in (*FEATURES, TEXT_FEATURE):
        mine = [one for one in verdicts if one.feature == feature]
        drawing = Redrawing(known, mine)
        for one in mine:
            seen = drawing.seen(one)
            asked = question(book, one, seen)
            match = next(r for r in left if r.text == asked and same(r.pictures, list(seen.pictures)))
            assert "not known" not in seen.how
            left.remove(match)
    assert not left, "each request is one verdict's"


def test_a_heat_map_that_cannot_be_drawn_is_not_made_up(known: FeatureStore, tmp_path: Path) -> None:
    verdicts, _, _ = judged(known, tmp_path, "heat")
    wrong = next(one for one in verdicts if one.scorer == "fuzzing" and one.image is not None and not one.truth)
    (picture,), how = Redrawing(known, [wrong]).seen(wrong)
    assert "not known" in how
    assert picture.size == known.prompt(wrong.prompt_id).images[wrong.image or 0].size
    assert "not known" not in Redrawing(known, verdicts).seen(wrong).how


def test_the_page_gets_both_pictures_and_the_words_of_a_failure(known: FeatureStore, tmp_path: Path) -> None:
    verdicts, _, book = judged(known, tmp_path / "scores", "both")
    mine = [one for one in verdicts if one.feature == 0]
    groups = verdict_groups(mine, ["image"], known, Assets(tmp_path), prompts=book)
    fuzzing = next(group for group in groups if group.task == "fuzzing" and not group.control)
    assert {len(one.pictures) for one in fuzzing.verdicts} == {2}
    assert "thing 0" in fuzzing.question and fuzzing.question.count("<image>") == 2
    assert fuzzing.seen == "cut out, then outlined in its picture"
    failed = [one for group in groups for one in group.verdicts if one.outcome == "unanswered"]
    assert failed and all(one.reply == "perhaps" and one.question for one in failed)
    for one in (one for group in groups for one in group.verdicts):
        for picture in one.pictures:
            with Image.open(tmp_path / picture.url) as opened:
                assert opened.size == (picture.width, picture.height)


def test_what_is_shown_smaller_says_how_large_it_was(tmp_path: Path, store: FeatureStore) -> None:
    large = Image.new("RGB", (MAX_SIDE * 2, MAX_SIDE), "red")
    whole = next(one for one in store.examples(0, "top", "image"))
    verdict = Verdict(
        feature=0,
        modality="image",
        scorer="detection",
        control=False,
        position=0,
        explanation="x",
        truth=True,
        answer=True,
        prompt_id=whole.prompt_id,
        kind="ordinary",
        image=0,
        box=None,
        text=None,
        failure=None,
        quantile=0.3,
    )
    prompt = store.prompt(whole.prompt_id)
    kept = prompt.images[0]
    prompt.images[0] = large
    try:
        ((one,),) = (group.verdicts for group in verdict_groups([verdict], [], store, Assets(tmp_path)))
    finally:
        prompt.images[0] = kept
    assert one.seen == f"the whole picture; the judge saw {MAX_SIDE * 2} \u00d7 {MAX_SIDE} pixels"
    assert one.kind == "ordinary, 25-50 %"
