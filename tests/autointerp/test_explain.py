"""Explaining: what the explainer sees, what is kept, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import sae_lens_multimodal.autointerp.explain as explain_module
from sae_lens_multimodal.autointerp.explain import explain
from sae_lens_multimodal.autointerp.explanation import Explanation, read_explanations
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.judges import FailureKind, JudgeFailure, JudgeRequest, ScriptedJudge
from sae_lens_multimodal.autointerp.records import RecordFolder
from sae_lens_multimodal.autointerp.regions import find_regions
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.errors import ConfigError, FeatureError, JudgeError, StoreError
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book
from tests.autointerp.sample import COLOURS, TEXT_FEATURE, perfect

BOOK = scenes_prompt_book()
GOOD = '{"common": true, "explanation": "red things", "label": "red"}'


def run(store: FeatureStore, judge: ScriptedJudge, output: Path, **options: object) -> list[Explanation]:
    return explain(store, judge, output=output, progress=False, **{"prompts": BOOK, **options})  # type: ignore[arg-type]


def test_known_features_are_explained_rightly(store: FeatureStore, tmp_path: Path) -> None:
    found = run(store, ScriptedJudge(perfect), tmp_path / "out")
    assert [(one.feature, one.modality, one.text) for one in found] == [
        *((feature, "image", colour) for feature, colour in enumerate(COLOURS)),
        (TEXT_FEATURE, "text", "red"),
    ]
    assert read_explanations(tmp_path / "out") == found
    assert all(one.status == "explained" and one.judge == "scripted" for one in found)


def test_explainer_sees_different_prompts_and_pictures(store: FeatureStore, tmp_path: Path) -> None:
    for one in run(store, ScriptedJudge(perfect), tmp_path / "out", n_examples=5, n_contrast=3):
        active = [shown for shown in one.shown if shown.active]
        assert len(active) == len({shown.prompt_id for shown in active}) == 5
        assert len(one.shown) <= 8
        if one.modality == "image":
            assert all(shown.box is not None and shown.image == 0 for shown in one.shown)
            assert len(one.image_ids) == len(one.prompt_ids)
        else:
            assert all("[" in str(shown.text) for shown in active)


def test_general_explainer_is_shown_active_and_silent_regions(store: FeatureStore, tmp_path: Path) -> None:
    judge = ScriptedJudge(lambda _: GOOD)
    run(store, judge, tmp_path / "out", features=[0], prompts=GeneralPrompts(), n_examples=3, n_contrast=2)
    (request,) = judge.requests
    assert len(request.pictures) == 3 * 2 + 2
    assert request.text.count("on which it fires") >= 3
    assert request.text.count("Silent region") == 2


def test_explainer_can_be_shown_heat_maps(store: FeatureStore, tmp_path: Path) -> None:
    judge = ScriptedJudge(lambda _: GOOD)
    book = GeneralPrompts(explain_style=RegionStyle(view="heat"))
    (found,) = run(store, judge, tmp_path / "out", features=[0], prompts=book, n_examples=2, n_contrast=1)
    (request,) = judge.requests
    first = find_regions(store.examples(0, "top", "image")[0])[0]
    assert found.shown[0].box == first.box
    picture = store.examples(0, "top", "image")[0].images[0]
    shown = np.asarray(request.pictures[0]).astype(int)
    assert request.pictures[0].size == picture.size
    assert request.pictures[2].size != picture.size, "what is silent is cut out"
    x0, y0, x1, y1 = (round(value) for value in first.box)
    tint = shown[..., 0] - shown[..., 2]
    assert tint[y0:y1, x0:x1].mean() > tint.mean() + 20


def test_examples_without_a_region_are_left_out(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = store.examples(0, "top", "image")[0].prompt_id
    monkeypatch.setattr(
        explain_module, "find_regions", lambda e, **o: [] if e.prompt_id == bare else find_regions(e, **o)
    )
    (found,) = run(store, ScriptedJudge(perfect), tmp_path / "out", features=[0])
    assert found.text == "red"
    assert bare not in found.prompt_ids
    monkeypatch.setattr(explain_module, "find_regions", lambda *_, **__: [])
    judge = ScriptedJudge([])
    assert run(store, judge, tmp_path / "none", features=[0]) == []
    assert read_explanations(tmp_path / "none") == [], "there is none yet, in a folder of explanations"


def test_ledger_adds_up_over_runs_and_survives_an_error(store: FeatureStore, tmp_path: Path) -> None:
    judge = ScriptedJudge(perfect)
    run(store, judge, tmp_path / "elsewhere", features=[0, 1])
    run(store, judge, tmp_path / "out", features=[0])
    with pytest.raises(JudgeError):
        run(store, ScriptedJudge(["green"]), tmp_path / "out", features=[1, 2])
    written = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert set(written) == {"calls", "cached", "tokens_in", "tokens_out", "seconds", "failures"}
    assert (written["calls"], written["cached"], written["failures"]) == (2, 0, {})


def test_both_modalities_and_one(store: FeatureStore, tmp_path: Path) -> None:
    judge = ScriptedJudge(perfect)
    both = run(store, judge, tmp_path / "both", features=[0, TEXT_FEATURE], modality="both")
    assert [(one.feature, one.modality) for one in both] == [(0, "image"), (TEXT_FEATURE, "text")]
    assert run(store, judge, tmp_path / "text", features=[0], modality="text") == []
    with pytest.raises(ConfigError, match="modality is 'sound'"):
        run(store, judge, tmp_path / "sound", modality="sound")


def test_replies_that_do_not_parse_are_kept_as_failures(store: FeatureStore, tmp_path: Path) -> None:
    replies = {0: "they are all lovely", 1: "nothing", 2: "blue"}
    numbers = iter(replies)
    found = run(store, ScriptedJudge(lambda _: replies[next(numbers)]), tmp_path / "out", features=[0, 1, 2])
    assert [one.status for one in found] == ["failed", "nothing in common", "explained"]
    failure = found[0].failure
    assert failure is not None
    assert (failure.kind, failure.reply) == (FailureKind.UNPARSABLE, "they are all lovely")
    assert "what do these have in common" in failure.prompt
    assert found[0].text == ""
    assert read_explanations(tmp_path / "out") == found


def test_goes_on_after_the_judge_went_down(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(JudgeError):
        run(store, ScriptedJudge(["red", "green"]), tmp_path / "out")
    assert [one.text for one in read_explanations(tmp_path / "out")] == ["red", "green"]
    with (tmp_path / "out" / "explanations.jsonl").open("a") as file:
        file.write('{"feature": 2, "text": "torn')
    judge = ScriptedJudge(perfect)
    found = run(store, judge, tmp_path / "out")
    assert len(judge.requests) == 3
    assert [one.feature for one in found] == [0, 1, 2, 3, 4]
    assert len(read_explanations(tmp_path / "out")) == 5
    again = ScriptedJudge([])
    assert run(store, again, tmp_path / "out") == found
    assert again.requests == []


def test_other_settings_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    run(store, ScriptedJudge(perfect), tmp_path / "out", features=[0])
    with pytest.raises(StoreError, match=r"other settings.*n_examples was 5, now 4"):
        run(store, ScriptedJudge(perfect), tmp_path / "out", n_examples=4)
    with pytest.raises(StoreError, match="judge was 'scripted', now 'other'"):
        run(store, ScriptedJudge(perfect, name="other"), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="files but no"):
        run(store, ScriptedJudge(perfect), tmp_path / "full")


def test_transient_failures_are_tried_again_on_demand(store: FeatureStore, tmp_path: Path) -> None:
    def late(request: JudgeRequest) -> JudgeFailure:
        return JudgeFailure.of(request, FailureKind.TIMEOUT, "late")

    def never(_: JudgeRequest) -> str:
        raise AssertionError

    assert run(store, ScriptedJudge(late), tmp_path / "out", features=[0])[0].status == "failed"
    assert run(store, ScriptedJudge(never), tmp_path / "out", features=[0])[0].status == "failed"
    assert run(store, ScriptedJudge(perfect), tmp_path / "out", features=[0], retry_failed=True)[0].text == "red"
    assert [one.text for one in read_explanations(tmp_path / "out")] == ["red"]


def test_unknown_feature_and_bad_numbers(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="feature 99"):
        run(store, ScriptedJudge(perfect), tmp_path / "a", features=[99])
    with pytest.raises(ConfigError, match="n_examples=0"):
        run(store, ScriptedJudge(perfect), tmp_path / "b", n_examples=0)


def test_explanations_by_hand_are_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    lines = [{"feature": 3, "text": "wheels of cars and bicycles"}, {"feature": 3, "text": "car", "modality": "text"}]
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    first, second = read_explanations(file)
    assert (first.judge, first.label, first.modality) == ("by hand", "wheels of cars and …", "image")
    assert second.modality == "text"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is list"),
        ('{"text": "red"}', "line 1: expected at least"),
        ('{"feature": true, "text": "red"}', "line 1: expected at least"),
        ('{"feature": 1, "text": 2}', "line 1: expected at least"),
        ('{"feature": 1, "text": "a", "modality": "sound"}', "expected 'image' or 'text'"),
        ('{"feature": 1, "text": "a", "colour": "red"}', "line 1: not an explanation"),
        ('{"feature": 1, "text": "a", "shown": [3]}', "line 1: not an explanation"),
        ('{"feature": 1, "text": "a"}\n{"feature": 1, "text": "b"}', "line 2 explains feature 1 from image again"),
    ],
)
def test_explanations_by_hand_in_another_shape_are_refused(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(line)
    with pytest.raises(StoreError, match=message) as caught:
        read_explanations(file)
    assert "\n" not in str(caught.value)


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        read_explanations(tmp_path / "none.jsonl")
    with pytest.raises(StoreError, match=r"has no manifest\.json"):
        read_explanations(tmp_path)


def test_records_hold_whatever_a_model_says(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path / "out", kind="test", schema_version=1, settings={})
    said = ["one\u2028two\u2029three\x85four", "\ud83d", "five\nsix"]
    folder.append("records", [{"text": text} for text in said])
    assert [record["text"] for record in folder.read("records")] == said
    folder.replace("records", [{"text": text} for text in said[:2]])
    assert [record["text"] for record in folder.read("records")] == said[:2]
