"""Measures that are numbers: right ones for what is known, floors beside them, failures counted both ways."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.embedding import TextImageEmbedding, tower_embedding
from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.judges import FailureKind, JudgeFailure, JudgeRequest, Outcome, ScriptedJudge
from sae_lens_multimodal.autointerp.measure_summary import measure_lines, summarise_measures
from sae_lens_multimodal.autointerp.measurer import Measure, Measurer
from sae_lens_multimodal.autointerp.measures import measure, read_measures
from sae_lens_multimodal.autointerp.metrics import auroc
from sae_lens_multimodal.autointerp.results import read_scores, read_verdicts, summarise
from sae_lens_multimodal.autointerp.score import score
from sae_lens_multimodal.autointerp.scorers.embedding import EmbeddingScorer
from sae_lens_multimodal.autointerp.scorers.intruder import IntruderScorer
from sae_lens_multimodal.autointerp.scorers.masks import MaskScorer
from sae_lens_multimodal.autointerp.scorers.simulation import SimulationScorer, average_precision
from sae_lens_multimodal.autointerp.scorers.steering import SteeringScorer
from sae_lens_multimodal.autointerp.selection import held_out
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.errors import ConfigError, ModelLoadError, SelectionError, StoreError
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book
from sae_lens_multimodal.scenes.world import make_scene
from tests.autointerp.sample import COLOURS, HOOK, LAST_HOOK, TEXT_FEATURE, perfect, red_sae, seen_colours

BOOK = scenes_prompt_book()
RIGHT = [Explanation(feature=feature, text=colour) for feature, colour in enumerate(COLOURS)]


def run(store: FeatureStore, measurer: Measurer, output: Path, **options: Any) -> list[Measure]:
    return measure(store, options.pop("explanations", RIGHT), [measurer], output=output, progress=False, **options)


def test_crops_are_told_apart_by_who_sees(store: FeatureStore, tmp_path: Path) -> None:
    scores = score(
        store,
        ScriptedJudge(perfect),
        [*RIGHT, Explanation(feature=TEXT_FEATURE, text="red", modality="text")],
        output=tmp_path / "out",
        prompts=BOOK,
        scorers=["detection_crop"],
        progress=False,
    )
    for one in scores[:4]:
        assert one.balanced_accuracy is not None
        assert one.balanced_accuracy >= 0.9
        assert one.n == 10
        assert one.tpr_by_band["top"] >= 0.8
    assert scores[4].n == 0
    assert sorted(read_scores(tmp_path / "out"), key=lambda one: one.feature) == scores
    shown = [(one.truth, one.kind == "silent") for one in read_verdicts(tmp_path / "out") if not one.control]
    assert all(truth != silent for truth, silent in shown)
    assert summarise(scores)[0].to_json()["tpr_by_band"]["top"]["n"] == 4


def odd_one(request: JudgeRequest) -> str:
    """Find the picture whose colours the others do not share."""
    seen = [seen_colours(picture, share=0.1) for picture in request.pictures]
    for number in range(len(seen)):
        others = set.intersection(*(one for index, one in enumerate(seen) if index != number))
        if others - seen[number]:
            return json.dumps({"intruder": number + 1})
    return '{"intruder": 1}'


def test_intruder_is_found_by_who_sees_and_by_chance_by_who_does_not(store: FeatureStore, tmp_path: Path) -> None:
    book = GeneralPrompts()
    seeing = run(store, IntruderScorer(ScriptedJudge(odd_one), book), tmp_path / "a")
    assert all(one.found.n == 4 and one.control is None for one in seeing)
    assert np.mean([one.found.values["accuracy"] for one in seeing]) >= 0.8
    assert seeing[0].found.values["chance"] == 0.25
    blind = run(store, IntruderScorer(ScriptedJudge(lambda _: '{"intruder": 2}'), book), tmp_path / "b")
    assert [one.found.values["accuracy"] for one in blind] == [0.25] * 4, "it stands in every position equally often"
    wordless = run(store, IntruderScorer(ScriptedJudge([]), BOOK), tmp_path / "c")
    assert wordless[0].found.note == "the prompt book cannot ask for an intruder"


def test_the_intruder_is_not_told_by_its_size(store: FeatureStore) -> None:
    book = GeneralPrompts(fuzz_style=RegionStyle(view="crop", margin_pixels=0))
    scorer = IntruderScorer(ScriptedJudge([]), book)
    guesses: list[list[bool]] = []
    for seed in range(30):
        for feature in range(len(COLOURS)):
            rng = np.random.default_rng(seed)
            examples = held_out(store, feature, "image", prompts=[], images=[], rng=rng)
            for views, place, _ in scorer._trials(examples, rng):
                assert len({min(view.size) for view in views}) == 1
                lengths = [max(view.size) for view in views]
                apart = [sorted(abs(one - other) for other in lengths)[1] for one in lengths]
                guesses.append([place == guess for guess in map(np.argmin, (lengths, np.negative(lengths), apart))])
    assert len(guesses) == 30 * 4 * 4
    assert np.mean(guesses, axis=0) == pytest.approx(0.25, abs=0.1), "the smallest, the largest, the one with a twin"


def test_failures_are_missing_in_one_number_and_wrong_in_the_other(store: FeatureStore, tmp_path: Path) -> None:
    turn = iter(range(100))

    def sometimes(request: JudgeRequest) -> str | JudgeFailure:
        number = next(turn) % 4
        if number == 0:
            return JudgeFailure.of(request, FailureKind.SERVER, "down")
        return '{"intruder": 9}' if number == 1 else odd_one(request)

    for one in run(store, IntruderScorer(ScriptedJudge(sometimes), GeneralPrompts()), tmp_path / "out"):
        assert one.found.n_failed == 2
        assert one.found.values["accuracy_strict"] == pytest.approx(one.found.values["accuracy"] / 2)


@pytest.mark.parametrize("reply", ['{"intruder": 0}', '{"intruder": 5}', '{"intruder": true}', "the red one", "[1]"])
def test_intruders_that_were_not_shown_are_refused(reply: str) -> None:
    assert GeneralPrompts().read_intruder(reply, 4) is None
    assert GeneralPrompts().read_intruder(" 4.", 4) == 3


def test_simulation_cell_by_cell_follows_the_feature(store: FeatureStore, tmp_path: Path) -> None:
    found = run(store, SimulationScorer(ScriptedJudge(perfect), BOOK), tmp_path / "out")
    for one in found:
        values = one.found.values
        assert values["correlation"] > 0.5
        assert values["average_precision"] > values["prevalence"] + 0.3
        assert values["correlation_strict"] == pytest.approx(values["correlation"])
        assert one.control is not None
        assert one.control.values["correlation"] < 0.4
    strange = [Explanation(feature=0, text="wheels")]
    (none,) = run(store, SimulationScorer(ScriptedJudge([]), BOOK), tmp_path / "b", explanations=strange)
    assert "no words" in none.found.note


def grid_of(request: JudgeRequest) -> str:
    asked = next(colour for colour in COLOURS if f"Description: {colour}" in request.text)
    picture = request.pictures[0]
    boxes = SimulationScorer(ScriptedJudge([]), GeneralPrompts())._boxes(*picture.size)
    cells = [9 if asked in seen_colours(picture.crop(box), share=0.2) else 0 for box in boxes]
    return json.dumps({"grid": [cells[start : start + 4] for start in range(0, 16, 4)]})


def test_simulation_by_whole_grids_and_grids_of_another_size(store: FeatureStore, tmp_path: Path) -> None:
    found = run(store, SimulationScorer(ScriptedJudge(grid_of), GeneralPrompts()), tmp_path / "out")
    assert all(one.found.values["correlation"] > 0.5 and one.found.n_failed == 0 for one in found)
    turn = iter(range(100))
    torn = ScriptedJudge(lambda r: grid_of(r) if next(turn) % 2 else '{"grid": [[1, 2], [3, 4]]}')
    half = run(store, SimulationScorer(torn, GeneralPrompts()), tmp_path / "b", control=False)
    for one in half:
        assert one.found.n_failed == 3
        assert one.found.values["correlation_strict"] < one.found.values["correlation"]


@pytest.mark.parametrize(
    "reply",
    [
        "4",
        '{"grid": 3}',
        '{"grid": [[1, 2]]}',
        '{"grid": [[1], [2]]}',
        '{"grid": [[1, 10], [0, 0]]}',
        '{"grid": [[1, true], [0, 0]]}',
        '{"grid": [["1", 2], [0, 0]]}',
    ],
)
def test_grids_of_other_shapes_are_refused(reply: str) -> None:
    assert GeneralPrompts().read_grid(reply, 2, 2) is None
    assert GeneralPrompts().read_grid('{"grid": [[1, 2], [0, 0.5]]}', 2, 2) == [[1, 2], [0, 0.5]]


def test_formulas_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truths, ranking = rng.random(60) < 0.3, rng.integers(0, 10, 60).astype(float)
    assert average_precision(truths, ranking) == pytest.approx(average_precision_score(truths, ranking))
    assert auroc(ranking[truths], ranking[~truths]) == pytest.approx(roc_auc_score(truths, ranking))


class _ColourSpace:
    """Texts and pictures as shares of colours."""

    name = "colours"

    def texts(self, texts: Any) -> Any:
        return np.array([[float(colour == text) for colour in COLOURS] for text in texts])

    def images(self, pictures: Any) -> Any:
        return np.array([[float(colour in seen_colours(one, share=0.1)) for colour in COLOURS] for one in pictures])


def test_embedding_tells_firing_regions_from_silent_ones(store: FeatureStore, tmp_path: Path) -> None:
    space: Any = _ColourSpace()
    found = run(store, EmbeddingScorer(space), tmp_path / "out")
    for one in found:
        assert one.control is not None
        assert one.found.values["auroc"] > 0.9
        assert one.control.values["auroc"] < 0.7
        assert one.found.values["clip_region"] > one.control.values["clip_region"]
        assert set(one.found.by_band) == {"top"}
    (line,) = [one for one in summarise_measures(found) if one.value == "auroc"]
    assert line.lift is not None
    assert line.lift.low > 0
    (image,) = [one for one in summarise_measures(found) if one.value == "clip_region"]
    assert image.by_band["top"] is not None
    assert image.by_band["top"].n == 4


def test_without_an_embedding_it_is_skipped_with_a_reason(store: FeatureStore, tmp_path: Path) -> None:
    found = run(store, EmbeddingScorer(None), tmp_path / "out")
    assert {one.found.note for one in found} == {"skipped: no CLIP or SigLIP was given to compare texts with pictures"}
    assert summarise_measures(found) == []


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_any_clip_or_siglip_of_transformers_serves(kind: str, model: VisionLanguageModel) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model.tokenizer.backend_tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=8,
        model_input_names=["input_ids", "attention_mask"],
    )
    size = {"height": 16, "width": 16}
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    words = {**text, "vocab_size": len(tokenizer), "max_position_embeddings": 8, "eos_token_id": 2}
    vision = {**text, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        module: Any = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=6))
    else:
        module = SiglipModel(SiglipConfig(text_config=words, vision_config=vision))
    embedding = TextImageEmbedding(module, CLIPProcessor(pictures, tokenizer), name=kind, batch_size=2)
    seen = [make_scene(seed).image for seed in range(3)]
    images, texts = embedding.images(seen), embedding.texts(["red circle", "blue", "a very long text about it all ."])
    assert images.shape == texts.shape == (3, 6 if kind == "clip" else 8)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    (alone,) = embedding.images(seen[2:])
    np.testing.assert_allclose(images[2], alone, atol=1e-5)
    with torch.no_grad():
        ids = tokenizer(["blue"], padding="max_length", truncation=True, return_tensors="pt")
        expected = module.get_text_features(**ids).pooler_output[0]
    np.testing.assert_allclose(texts[1], (expected / expected.norm()).numpy(), atol=1e-5)


def test_what_is_no_embedding_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="expected a CLIP or SigLIP checkpoint"):
        TextImageEmbedding.load(tmp_path)


def test_the_models_own_tower_finds_what_looks_alike(model: VisionLanguageModel) -> None:
    scenes = [make_scene(seed).image for seed in (1, 2)]
    nearly = scenes[0].copy()
    nearly.putpixel((0, 0), (0, 0, 0))
    vectors = tower_embedding(model, batch_size=2)([*scenes, nearly])
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1] + 0.01


def mask_of(text: str, example: Any, image: int) -> Any:
    del image
    if text not in COLOURS:
        return None
    scene = make_scene(example.prompt_id)
    height, width = scene.image.size[1], scene.image.size[0]
    masks = [one.mask for one in scene.objects if one.colour == text]
    return np.any(masks, axis=0) if masks else np.zeros((height, width), dtype=bool)


def test_masks_agree_with_known_features_and_not_with_others(store: FeatureStore, tmp_path: Path) -> None:
    found = run(store, MaskScorer(mask_of, source="scenes"), tmp_path / "out")
    for one in found:
        values = one.found.values
        assert values["iou"] > values["iou_floor"] + 0.2
        assert values["pointing"] > 0.9 > values["pointing_floor"]
        assert one.control is not None
        assert one.control.values["iou"] < 0.1
    strange = [Explanation(feature=0, text="wheels")]
    (none,) = run(store, MaskScorer(mask_of, source="scenes"), tmp_path / "b", explanations=strange)
    assert none.found.note == "no mask is known for this explanation"
    assert none.found.n_failed == none.found.n > 0
    with pytest.raises(SelectionError, match="give masks of the original picture"):
        run(store, MaskScorer(lambda *_: np.zeros((2, 2), bool), source="bad"), tmp_path / "c")


def test_unknown_masks_count_as_nothing_in_the_strict_numbers(store: FeatureStore, tmp_path: Path) -> None:
    turn = iter(range(100))
    half = MaskScorer(lambda *given: mask_of(*given) if next(turn) % 2 else None, source="half")
    for one in run(store, half, tmp_path / "out", control=False):
        assert one.found.n_failed == one.found.n / 2
        assert one.found.values["iou_strict"] == pytest.approx(one.found.values["iou"] / 2)


def test_steering_makes_the_model_say_what_the_feature_writes(
    store: FeatureStore, model: VisionLanguageModel, tmp_path: Path
) -> None:
    question = {"type": "text", "text": "a blue square . what is in the picture ?"}
    asked = [[{"role": "user", "content": [question]}]]
    judge = ScriptedJudge(lambda r: "yes" if "red" in str(r.parts[-1]).split(" is there ")[0] else "no")
    measurer = SteeringScorer(model, red_sae(model), store, judge, BOOK, asked, max_new_tokens=3)
    explained = [Explanation(feature=0, text="red"), Explanation(feature=1, text="green")]
    red, green = run(store, measurer, tmp_path / "out", explanations=explained)
    assert red.found.values == {
        "said_before": 0,
        "said": 1,
        "said_random": 0,
        "effect": 1,
        "said_strict": 1,
        "effect_strict": 1,
    }
    assert green.found.values["effect"] == 0
    with pytest.raises(ConfigError, match="expected some"):
        SteeringScorer(model, red_sae(model), store, judge, BOOK, [])


def test_results_are_kept_and_other_settings_refused(store: FeatureStore, tmp_path: Path) -> None:
    first = run(store, MaskScorer(mask_of, source="scenes"), tmp_path / "out")
    assert read_measures(tmp_path / "out") == first
    again = run(store, MaskScorer(lambda *_: pytest.fail("it is known"), source="scenes"), tmp_path / "out")
    assert again == first
    with pytest.raises(StoreError, match="other settings"):
        run(store, MaskScorer(mask_of, source="others"), tmp_path / "out")
    with pytest.raises(ConfigError, match="each only once"):
        measure(store, RIGHT, [], output=tmp_path / "none")


def test_what_cannot_be_measured_says_why(store: FeatureStore, tmp_path: Path) -> None:
    odd = [Explanation(feature=0, text=""), Explanation(feature=TEXT_FEATURE, text="red", modality="text")]
    notes = [one.found.note for one in run(store, MaskScorer(mask_of, source="s"), tmp_path / "o", explanations=odd)]
    assert notes == ["the explainer found nothing in common", "masks does not measure explanations from text"]
    assert HOOK != LAST_HOOK


class _Batches(ScriptedJudge):
    """Notes how many requests come together."""

    def __init__(self) -> None:
        super().__init__(lambda _: '{"intruder": 2}')
        self.sizes: list[int] = []

    def _replies(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, Outcome]]:
        self.sizes.append(len(requests))
        return super()._replies(requests)


def test_many_explanations_ask_together(store: FeatureStore, tmp_path: Path) -> None:
    judge = _Batches()
    run(store, IntruderScorer(judge, GeneralPrompts(), n_trials=3), tmp_path / "out")
    assert judge.sizes == [3 * len(RIGHT)]


def test_a_folder_grows_by_explanations_and_measurers(store: FeatureStore, tmp_path: Path) -> None:
    judge = _Batches()
    intruder, masks = IntruderScorer(judge, GeneralPrompts()), MaskScorer(mask_of, source="scenes")
    first = run(store, intruder, tmp_path / "out", explanations=RIGHT[:2])
    n_asked = len(judge.requests)
    both = measure(store, RIGHT, [intruder, masks], output=tmp_path / "out", progress=False)
    assert len(judge.requests) == 2 * n_asked
    assert [one for one in both if one.measurer == "intruder"][:2] == first
    assert [(one.feature, one.measurer) for one in both][:3] == [(0, "intruder"), (0, "masks"), (1, "intruder")]
    assert run(store, masks, tmp_path / "out") == both[1::2], "with some of its measurers, too"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {one["measurer"] for one in summary["numbers"]} == {"intruder", "masks"}
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["calls"] == len(judge.requests)
    with pytest.raises(StoreError, match="other settings of intruder"):
        run(store, IntruderScorer(judge, GeneralPrompts(), n_trials=2), tmp_path / "out")
    with pytest.raises(StoreError, match=r"other settings \(seed\)"):
        run(store, masks, tmp_path / "out", seed=1)
    with pytest.raises(StoreError, match="another explanation of feature 0 from image: 'red', now 'blue'"):
        run(store, masks, tmp_path / "out", explanations=[Explanation(feature=0, text="blue")])
    with pytest.raises(ConfigError, match="explained from image twice"):
        run(store, masks, tmp_path / "out", explanations=[*RIGHT, RIGHT[0]])


def test_what_was_skipped_or_had_no_words_is_measured_once_it_can_be(store: FeatureStore, tmp_path: Path) -> None:
    nothing = Explanation(feature=0, text="")
    space: Any = _ColourSpace()
    skipped = run(store, EmbeddingScorer(None), tmp_path / "out", explanations=[nothing, *RIGHT[1:2]])
    assert [one.found.note[:8] for one in skipped] == ["the expl", "skipped:"]
    found = run(store, EmbeddingScorer(space), tmp_path / "out", explanations=RIGHT[:2])
    assert all(one.found.values and one.control is not None for one in found)
    assert sorted(read_measures(tmp_path / "out"), key=lambda one: one.feature) == found
    with pytest.raises(StoreError, match="other settings of embedding"):
        run(store, EmbeddingScorer(None), tmp_path / "out", explanations=RIGHT[:2])


def test_a_control_that_comes_later_is_measured(store: FeatureStore, tmp_path: Path) -> None:
    masks = MaskScorer(mask_of, source="scenes")
    (alone,) = run(store, masks, tmp_path / "out", explanations=RIGHT[:1])
    assert alone.control is None
    beside = run(store, masks, tmp_path / "out", explanations=RIGHT[:2])
    assert beside[0].control is not None and beside[0].found == alone.found


def test_no_failure_speaks_for_an_explanation(store: FeatureStore, tmp_path: Path) -> None:
    """Masks are known of one explanation's pictures only in part: strictly missed there, and found for the control."""
    half = iter(range(1000))

    def sometimes(*given: Any) -> Any:
        return mask_of(*given) if next(half) % 2 else None

    found = run(store, MaskScorer(sometimes, source="half"), tmp_path / "out", explanations=RIGHT[:2])
    for one in found:
        assert one.found.values["iou_strict"] < one.found.values["iou"]
        assert one.control is not None
        assert one.control.values["iou_strict"] == pytest.approx((1 + one.control.values["iou"]) / 2)
    (lift,) = [one for one in summarise_measures(found) if one.value == "iou_strict"]
    (plain,) = [one for one in summarise_measures(found) if one.value == "iou"]
    assert lift.lift is not None and plain.lift is not None
    assert lift.lift.mean < plain.lift.mean


def test_a_picture_that_fails_counts_as_its_opposite(store: FeatureStore, tmp_path: Path) -> None:
    failing = ScriptedJudge(lambda request: JudgeFailure.of(request, FailureKind.SERVER, "down"))
    for one in run(store, SimulationScorer(failing, BOOK), tmp_path / "out"):
        assert set(one.found.values) == {"correlation_strict", "average_precision_strict"}
        assert one.found.values["correlation_strict"] < -0.3
        assert one.found.n_failed == one.found.n == 6


def test_steering_counts_failures_against_the_explanation(
    store: FeatureStore, model: VisionLanguageModel, tmp_path: Path
) -> None:
    asked = [[{"role": "user", "content": [{"type": "text", "text": "a blue square . what is in the picture ?"}]}]]
    failing = ScriptedJudge(lambda request: JudgeFailure.of(request, FailureKind.SERVER, "down"))
    scorer = SteeringScorer(model, red_sae(model), store, failing, BOOK, asked, max_new_tokens=3)
    (one,) = run(store, scorer, tmp_path / "out", explanations=RIGHT[:1])
    assert one.found.values == {"said_strict": 0.0, "effect_strict": -1.0}
    assert one.found.n_failed == one.found.n == 3


def test_lines_of_measures_show_numbers_and_reasons(store: FeatureStore, tmp_path: Path) -> None:
    found = measure(
        store, RIGHT, [MaskScorer(mask_of, source="s"), EmbeddingScorer(None)], output=tmp_path, progress=False
    )
    lines = measure_lines(found)
    (pointing,) = [line for line in lines if line.startswith("| masks | image | pointing |")]
    assert "| 4 of 4 |" in pointing and "top " in pointing
    assert lines[-1].startswith("embedding, explanations from image: 4 without numbers: skipped: no CLIP")
