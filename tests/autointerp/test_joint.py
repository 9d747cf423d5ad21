"""Examples in which a feature fires on a picture and on its text: shown, explained and tested together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.explain import explain
from sae_lens_multimodal.autointerp.explanation import Explanation, read_explanations
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.joint import LEAST_EXAMPLES, Joint, joint_examples
from sae_lens_multimodal.autointerp.judges import JudgeRequest, ScriptedJudge
from sae_lens_multimodal.autointerp.prompts import PromptBook
from sae_lens_multimodal.autointerp.regions import find_regions
from sae_lens_multimodal.autointerp.repeats import say_the_same, words_of
from sae_lens_multimodal.autointerp.results import Score, Verdict, read_verdicts
from sae_lens_multimodal.autointerp.score import score
from sae_lens_multimodal.autointerp.scorers import JointFuzzingScorer, Sampling
from sae_lens_multimodal.autointerp.selection import held_out
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.features.example import Example
from sae_lens_multimodal.features.schema import Kind, ModalityName
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.features.writer import StoreWriter
from sae_lens_multimodal.report.assets import Assets
from sae_lens_multimodal.report.judged import explanation_views
from sae_lens_multimodal.report.verdicts import verdict_groups
from sae_lens_multimodal.scenes.asking import draw_objects, text_context
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book
from sae_lens_multimodal.scenes.questions import COMMON_QUESTION
from sae_lens_multimodal.scenes.render import COLOUR_RGB
from sae_lens_multimodal.scenes.world import make_scene
from tests.autointerp.sample import blind, patch_activations, prompt_about, seen_colours

BOOK = scenes_prompt_book()
COLOURS = ("red", "blue", "yellow")
"""Features 0 to 2 fire on patches of these colours and on the words."""
PICTURES_ONLY = 3
"""Fires on red patches, and hardly on the word."""
GOOD = '{"common": true, "explanation": "red things", "label": "red"}'


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, model: VisionLanguageModel) -> FeatureStore:
    """A store of prompts with a picture and a text that tells of other objects of the same and of other colours."""
    writer = StoreWriter(tmp_path_factory.mktemp("both") / "store", d_sae=8)
    rows: dict[int, dict[int, np.ndarray]] = {feature: {} for feature in range(4)}
    for seed in range(200):
        scene = make_scene(seed)
        text = text_context(draw_objects(np.random.default_rng(seed), 5))
        batch = model.encode(prompt_about(scene.image, text))
        tokens, boxes = model.token_strings(batch["input_ids"][0]), batch.layout.boxes[0].numpy()
        writer.add_prompt(seed, tokens=tokens, layout=batch.layout.row(0), images=[scene.image])
        for feature, colour in enumerate((*COLOURS, "red")):
            said = 3.0 if feature < len(COLOURS) else 0.5
            values = patch_activations(scene, colour, boxes, strength=4.0 + seed % 7)
            rows[feature][seed] = values + np.array([said * (token.strip() == colour) for token in tokens], np.float32)
    for feature, found in rows.items():
        for modality in ("image", "text"):
            _add(writer, feature, modality, found)
    return writer.finish()


def _add(writer: StoreWriter, feature: int, modality: ModalityName, rows: dict[int, np.ndarray]) -> None:
    def most(seed: int) -> float:
        is_text = np.isin(rows[seed], (3.0, 0.5))
        return float(rows[seed][is_text if modality == "text" else ~is_text].max(initial=0.0))

    firing = sorted((seed for seed in rows if most(seed) > 0), key=lambda seed: -most(seed))
    silent = [seed for seed in rows if not rows[seed].any()]
    lists: dict[Kind, list[int]] = {"top": firing[:12], "ordinary": firing[12:40], "silent": silent[:8]}
    for kind, seeds in lists.items():
        for seed in seeds:
            writer.add_example(feature, prompt_id=seed, activations=rows[seed], kind=kind, modality=modality)


def lists_of(store: FeatureStore, feature: int) -> list[Example]:
    kinds: tuple[Kind, ...] = ("top", "ordinary")
    return [one for kind in kinds for name in ("image", "text") for one in store.examples(feature, kind, name)]


def test_joint_examples_fire_in_both_modalities_and_say_where(both: FeatureStore) -> None:
    for feature, colour in enumerate(COLOURS):
        examples = lists_of(both, feature)
        found = joint_examples(examples)
        assert len({one.example.prompt_id for one in found}) >= LEAST_EXAMPLES
        weaker = []
        for example, region, text in found:
            assert region == find_regions(example)[0]
            marked = {token.strip() for token, is_marked in zip(text.tokens, text.marked, strict=True) if is_marked}
            assert marked == {colour}
            assert min(example.max_image, example.max_text) >= 0.25 * max(e.max_activation for e in examples)
            weaker.append(min(example.max_image / max(one.example.max_image for one in found), example.max_text / 3))
        assert weaker == sorted(weaker, reverse=True)
        left_out = [one for one in examples if not (one.max_image and one.max_text)]
        assert left_out
        assert not {id(one) for one in left_out} & {id(one.example) for one in found}
    assert joint_examples(lists_of(both, PICTURES_ONLY)) == []
    assert joint_examples([]) == []


def seen_and_read(request: JudgeRequest) -> str:
    """Answer as someone who looks at the region and reads the marked words."""
    question = str(request.parts[-1])
    words = [piece.split("]")[0].split() for piece in question.split("[")[1:]]
    if question.endswith(COMMON_QUESTION):
        common = set.intersection(*map(set, words), *(seen_colours(one) for one in request.pictures))
        return sorted(common)[0] if common else "nothing"
    asked = next(word for word in reversed(question.replace("?", "").split()) if word in COLOUR_RGB)
    return "yes" if asked in seen_colours(request.pictures[0]) and [asked] in words else "no"


def explained(store: FeatureStore, output: Path, judge: ScriptedJudge, **options: object) -> list[Explanation]:
    given = {"prompts": BOOK, "procedure": Joint(), "modality": "both", "progress": False, **options}
    return explain(store, judge, output=output, **given)  # type: ignore[arg-type]


def test_one_answer_for_both_modalities_from_regions_and_words_shown_together(
    both: FeatureStore, tmp_path: Path
) -> None:
    judge = ScriptedJudge(seen_and_read)
    found = explained(both, tmp_path / "out", judge)
    assert [(one.feature, one.modality, one.text) for one in found] == [
        (feature, modality, colour) for feature, colour in enumerate(COLOURS) for modality in ("image", "text")
    ]
    assert read_explanations(tmp_path / "out") == found
    assert len(judge.requests) == len(COLOURS)
    for one, request in zip(found[::2], judge.requests, strict=True):
        active = [shown for shown in one.shown if shown.active]
        assert 2 <= len(active) == len(request.pictures) == len({shown.prompt_id for shown in active})
        assert all(shown.box and shown.text and f"[ {one.text} ]" in shown.text for shown in active)
        assert request.text.count("[") == len(active)
        assert set(one.image_ids) == {name for shown in one.shown for name in both.prompt(shown.prompt_id).image_ids}
        assert not any(
            say_the_same(words_of(a.text or ""), words_of(b.text or "")) for a in active for b in active if a is not b
        )
        silent = [shown for shown in one.shown if not shown.active]
        assert silent
        for shown in silent:
            assert not any(e.prompt_id == shown.prompt_id for e in lists_of(both, one.feature))


def test_general_book_names_region_and_words_of_each_prompt(both: FeatureStore, tmp_path: Path) -> None:
    judge = ScriptedJudge(lambda _: GOOD)
    options = {"prompts": GeneralPrompts(), "features": [0], "modality": "auto", "n_examples": 3, "n_contrast": 2}
    (found,) = explained(both, tmp_path / "out", judge, **options)
    assert (found.text, found.procedure) == ("red things", "joint")
    (request,) = judge.requests
    order = [part if isinstance(part, str) else "picture" for part in request.parts]
    for number in (1, 2, 3):
        place = next(index for index, part in enumerate(order) if part.startswith(f"Prompt {number}, the region"))
        assert order[place + 1 : place + 3] == ["picture", "picture"], "cut out, then marked"
        assert order[place + 3].startswith(f"The words of prompt {number} on which it fires: ")
        assert "<<red>>" in order[place + 3]
    assert sum(part.startswith("Silent prompt") for part in order) == 2


def test_heat_maps_can_be_shown(both: FeatureStore, tmp_path: Path) -> None:
    book = GeneralPrompts(explain_style=RegionStyle(view="heat"), fuzz_style=RegionStyle(view="heat"))
    judge = ScriptedJudge(lambda r: '{"answer": "yes"}' if '"answer"' in r.text else GOOD)
    (found,) = explained(both, tmp_path / "out", judge, prompts=book, features=[0], modality="auto")
    picture = both.prompt(found.shown[0].prompt_id).images[0]
    assert judge.requests[0].pictures[0].size == picture.size
    score(both, judge, [found], output=tmp_path / "s", prompts=book, scorers=["fuzzing_joint"], progress=False)
    (group,) = verdict_groups(read_verdicts(tmp_path / "s"), ["image"], both, Assets(tmp_path / "report"), prompts=book)
    assert group.seen == "its picture, coloured by activation"


def scored(store: FeatureStore, output: Path, judge: ScriptedJudge, explanations: list[Explanation]) -> list[Score]:
    options = {"prompts": BOOK, "scorers": ["fuzzing_joint"], "progress": False}
    return score(store, judge, explanations, output=output, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def verdicts(
    both: FeatureStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Explanation], list[Score], list[Verdict]]:
    folder = tmp_path_factory.mktemp("joint")
    explanations = explained(both, folder / "out", ScriptedJudge(seen_and_read))
    scores = scored(both, folder / "scores", ScriptedJudge(seen_and_read), explanations)
    return explanations, scores, read_verdicts(folder / "scores")


def test_who_sees_and_reads_scores_high_and_who_does_not_at_chance(
    both: FeatureStore, verdicts: tuple[list[Explanation], list[Score], list[Verdict]], tmp_path: Path
) -> None:
    explanations, scores, _ = verdicts
    for one in scores:
        assert one.n >= 6
        assert one.balanced_accuracy is not None
        assert one.balanced_accuracy >= 0.9
        assert one.control_balanced_accuracy is not None
        assert one.control_balanced_accuracy <= 0.5
    for one in scored(both, tmp_path / "blind", ScriptedJudge(blind), explanations):
        assert one.balanced_accuracy == 0.5


def test_scored_prompts_pictures_and_texts_were_not_shown(
    both: FeatureStore, verdicts: tuple[list[Explanation], list[Score], list[Verdict]]
) -> None:
    explanations, _, found = verdicts
    by_key = {(one.feature, one.modality): one for one in explanations}
    for verdict in found:
        own = by_key[verdict.feature, verdict.modality]
        assert verdict.prompt_id not in own.prompt_ids
        assert set(both.prompt(verdict.prompt_id).image_ids).isdisjoint(own.image_ids)
        assert verdict.text is not None
        assert not any(say_the_same(words_of(verdict.text), words_of(text)) for text in own.texts)


def test_right_and_wrong_come_from_the_same_prompts_with_a_region_and_marks_each(
    verdicts: tuple[list[Explanation], list[Score], list[Verdict]],
) -> None:
    own = [one for one in verdicts[2] if not one.control]
    for one in own:
        assert one.box is not None
        assert "[" in (one.text or "")
        assert (f"[ {COLOURS[one.feature]} ]" in (one.text or "")) == one.truth
    for feature in range(len(COLOURS)):
        mine = [one for one in own if one.feature == feature]
        right, wrong = ([one.prompt_id for one in mine if one.truth is truth] for truth in (True, False))
        assert sorted(right) == sorted(wrong)


def test_examples_of_both_lists_are_tested(both: FeatureStore) -> None:
    rng = np.random.default_rng(0)
    held = {flag: held_out(both, 0, "text", prompts=[], images=[], rng=rng, both_lists=flag) for flag in (False, True)}
    ids = {flag: {one.prompt_id for one in found.firing} for flag, found in held.items()}
    assert ids[False] < ids[True]
    items = JointFuzzingScorer().items(held[True], BOOK, Sampling(n_positive=20, n_negative=20), rng)
    assert {item.prompt_id for item in items} <= ids[True]
    assert all(one.max_text > 0 for one in held[True].firing)


def test_the_report_shows_picture_and_words_together(
    both: FeatureStore, verdicts: tuple[list[Explanation], list[Score], list[Verdict]], tmp_path: Path
) -> None:
    explanations, _, found = verdicts
    assets = Assets(tmp_path)
    (view,) = explanation_views(explanations[:1], both, assets)
    assert all(shown.picture is not None and shown.text for shown in view.shown)
    mine = [one for one in found if (one.feature, one.modality, one.control) == (0, "image", False)]
    (group,) = verdict_groups(mine, ["image"], both, assets, prompts=BOOK)
    for one in group.verdicts:
        assert len(one.pictures) == 1
        assert one.shown
        assert one.shown in one.question


class Wordless(GeneralPrompts):
    explain_joint = PromptBook.explain_joint  # type: ignore[assignment]
    fuzz_joint = PromptBook.fuzz_joint  # type: ignore[assignment]


def test_a_book_without_words_for_both_is_not_asked(both: FeatureStore, tmp_path: Path) -> None:
    assert explained(both, tmp_path / "out", ScriptedJudge([]), prompts=Wordless()) == []
    by_hand = [Explanation(feature=0, text="red")]
    (found,) = score(
        both,
        ScriptedJudge([]),
        by_hand,
        output=tmp_path / "s",
        prompts=Wordless(),
        scorers=["fuzzing_joint"],
        progress=False,
    )
    assert (found.n, found.n_not_asked > 0) == (0, True)


def test_features_of_one_modality_are_left_out(store: FeatureStore, tmp_path: Path) -> None:
    assert explained(store, tmp_path / "out", ScriptedJudge([])) == []
    with pytest.raises(ConfigError, match="least=0"):
        Joint(least=0)
