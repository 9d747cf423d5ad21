"""Labels of conjunctions, background and borders against the scenes themselves; tables of features by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_lens_multimodal.adapters.layout import TokenLayout
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.features.precision import ABSENT, PRESENT, UNSURE
from sae_lens_multimodal.scenes.concepts import ALL_CONCEPTS, CONCEPTS, CONJUNCTIONS, Concept, token_labels
from sae_lens_multimodal.scenes.cross_modal import cross_modal_lines, cross_modal_truth
from sae_lens_multimodal.scenes.rows import scene_rows
from sae_lens_multimodal.scenes.truth import Truth, fit_features
from sae_lens_multimodal.scenes.truth_tables import (
    concept_lines,
    concept_table,
    feature_lines,
    summary_lines,
    truth_record,
    truth_summary,
)
from sae_lens_multimodal.scenes.world import Scene, make_scene
from sae_lens_multimodal.training.floors import TokenMoments, axes_floor
from sae_lens_multimodal.training.tokens import LabelledBatch
from sae_lens_multimodal.types import Modality

NAN = (float("nan"),) * 4


def layout_of(scene: Scene | None, boxes: list[tuple[float, ...]], n_words: int) -> TokenLayout:
    """Patches with these boxes, then words."""
    codes = [Modality.IMAGE] * len(boxes) + [Modality.TEXT] * n_words
    return TokenLayout(
        modality=torch.tensor([codes], dtype=torch.int8),
        boxes=torch.tensor([[*boxes, *[NAN] * n_words]], dtype=torch.float32),
        image_index=torch.tensor([[0] * len(boxes) + [-1] * n_words]),
        tile=torch.tensor([[0] * len(boxes) + [-1] * n_words]),
        image_sizes=((scene.image.size,) if scene is not None else (),),
    )


def shown(labels: np.ndarray, value: int = PRESENT) -> set[str]:
    return {str(concept) for concept, label in zip(ALL_CONCEPTS, labels, strict=True) if label == value}


def test_there_are_as_many_concepts_as_the_world_allows() -> None:
    # colours x shapes, colours x textures, textures x shapes, all three
    assert len(CONJUNCTIONS) == 8 * 5 + 8 * 2 + 2 * 5 + 8 * 2 * 5
    assert len(set(ALL_CONCEPTS)) == len(ALL_CONCEPTS)


def test_a_word_shows_the_conjunctions_that_it_completes() -> None:
    words = ["a", "red", "striped", "circle", "letter", "x", ",", "blue", "red", "star", "circle"]
    labels = token_labels([], layout_of(None, [], len(words)), words, ALL_CONCEPTS)
    found = [shown(row) for row in labels]
    assert found[1] == {"red"}
    assert found[2] == {"striped", "red striped"}
    assert found[3] == {"circle", "red circle", "striped circle", "red striped circle"}
    assert found[5] == {"glyph x"}
    assert found[0] == found[4] == found[6] == set()
    assert found[8] == {"red"}  # two colours make no conjunction
    assert found[9] == {"star", "red star", "blue star"}
    assert found[10] == {"circle", "red circle", "blue circle"}


def test_a_word_that_names_nothing_can_be_a_concept_itself() -> None:
    words = ["is", "red", "there", "is"]
    concepts = (Concept("colour", "red"), Concept("word", "is"), Concept("word", "red"))
    labels = token_labels([], layout_of(None, [], len(words)), words, concepts)
    assert (labels == PRESENT).T.tolist() == [
        [False, True, False, False],
        [True, False, False, True],
        [False, False, False, False],
    ]


def test_patches_show_conjunctions_background_and_borders() -> None:
    scene = make_scene(3, n_objects=2)
    width, height = scene.image.size
    covered = np.zeros((height, width), dtype=bool)
    for thing in scene.objects:
        covered |= thing.mask
    boxes = [(x, y, x + 4, y + 4) for y in range(0, height - 3, 4) for x in range(0, width - 3, 4)]
    boxes += [(0, 0, 0, 0)]
    labels = token_labels([scene], layout_of(scene, boxes, 0), [""] * len(boxes), ALL_CONCEPTS)
    column = {str(concept): index for index, concept in enumerate(ALL_CONCEPTS)}
    for box, row in zip(boxes[:-1], labels, strict=False):
        x0, y0, x1, y1 = box
        inside = covered[y0:y1, x0:x1].mean()
        assert (row[column["background any"]] == PRESENT) == (inside <= 0.1)
        assert (row[column["background any"]] == ABSENT) == (inside >= 0.5)
        assert row[column[f"background {scene.background}"]] == row[column["background any"]]
        assert (row[column["border object"]] == PRESENT) == (0.25 < inside < 0.75)
        assert (row[column["border left"]] == PRESENT) == (x0 == 0)
        assert (row[column["border bottom"]] == PRESENT) == (y1 == height)
        for thing in scene.objects:
            share = thing.mask[y0:y1, x0:x1].mean()
            for name in (
                thing.colour,
                f"{thing.colour} {thing.shape}",
                f"{thing.colour} {thing.texture} {thing.shape}",
            ):
                expected = PRESENT if share >= 0.5 else UNSURE if share > 0.1 else ABSENT
                assert row[column[name]] == expected
    assert (labels[-1] == UNSURE).all()
    assert (labels[:, column["border object"]] == PRESENT).any()


def test_within() -> None:
    red, pair = Concept("colour", "red"), Concept("colour+shape", "red circle")
    triple = Concept("colour+texture+shape", "red striped circle")
    assert pair.within(red) and triple.within(pair) and triple.within(red)
    assert not red.within(pair) and not pair.within(pair)
    assert not Concept("colour+shape", "blue circle").within(red)


@pytest.fixture(scope="module")
def truth(model: VisionLanguageModel) -> Truth:
    """Of the model's own neurons at an early layer: real activations, cheap to have."""
    rows = list(scene_rows(4, 12, kinds=("scene", "text")))
    generator = torch.Generator().manual_seed(0)
    batch = LabelledBatch(torch.randn(99, model.d_model, generator=generator), torch.zeros(99, dtype=torch.int8))
    sae = axes_floor(TokenMoments.of([batch]), torch.eye(model.d_model), 24)
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    return fit_features(model, sae, rows, concepts=ALL_CONCEPTS)


def test_the_tables_agree_with_the_matrix(truth: Truth) -> None:
    table = {(one.kind, one.concept): one for one in concept_table(truth, Modality.IMAGE)}
    matrix = truth.precisions[Modality.IMAGE]
    tokens = truth.tokens[Modality.IMAGE]
    dense = np.zeros((len(tokens.labels), len(matrix)))
    dense[tokens.firings.token, tokens.firings.feature] = tokens.firings.value
    for column, concept in enumerate(truth.concepts):
        present = tokens.labels[:, column] == PRESENT
        if not present.any():
            assert (concept.kind, str(concept)) not in table
            continue
        one = table[concept.kind, str(concept)]
        assert one.n_tokens == present.sum()
        assert one.average_precision == pytest.approx(matrix[:, column].max())
        narrower = [
            fit.feature
            for fit in truth.features
            if fit.is_clear and fit.modality == Modality.IMAGE and fit.concept.within(concept)
        ]
        silent = dense[:, one.feature] == 0
        absorbed = (dense[:, narrower] > 0).any(axis=1) & silent
        assert one.absorbed == pytest.approx(absorbed[present].mean())
        assert one.narrower == len(narrower)


def test_what_is_chosen_on_one_half_is_measured_on_the_other(truth: Truth) -> None:
    one, other = truth.halves[Modality.IMAGE]
    second = truth.tokens[Modality.IMAGE].is_second
    assert 0 < second.sum() < len(second)
    for kind in ("colour", "background"):
        elsewhere = truth.best_by_value_elsewhere(Modality.IMAGE, kind)
        for column in truth.columns(kind):
            value = truth.concepts[column].value
            if value in elsewhere:
                there = other[np.nanargmax(one[:, column]), column]
                back = one[np.nanargmax(other[:, column]), column]
                assert elsewhere[value] == pytest.approx((there + back) / 2)
                assert there <= other[:, column].max()
    assert elsewhere


def test_lines_and_records(truth: Truth) -> None:
    summary = truth_summary(truth)
    assert summary["live"] == len(truth.features)
    assert 0 <= summary["clear_share"] <= 1
    assert len(summary_lines({"neurons": truth})) == 4
    assert any("background any" in line for line in concept_lines(truth, Modality.IMAGE))
    assert len(feature_lines(truth.features)) == len(truth.features) + 2
    record = truth_record(truth)
    assert len(record["features"]) == len(truth.features)
    assert record["concepts"]["text"]


def test_only_attributes_keeps_what_they_are(truth: Truth) -> None:
    few = truth.only_attributes()
    assert few.concepts == CONCEPTS
    assert few.best_by_value(Modality.TEXT, "colour") == truth.best_by_value(Modality.TEXT, "colour")
    assert {fit.concept.kind for fit in few.features} <= {"colour", "shape", "texture", "glyph"}


def test_without_words_the_rest_is_as_if_they_had_not_been_asked_for(model: VisionLanguageModel) -> None:
    rows = list(scene_rows(4, 16, kinds=("scene", "text")))
    words = [Concept("word", word) for word in ("is", "a", "the", "there", "in", "what", "?", ".")]
    sae = axes_floor(
        TokenMoments.of([LabelledBatch(torch.randn(99, model.d_model), torch.zeros(99, dtype=torch.int8))]),
        torch.eye(model.d_model),
        24,
    )
    hook = "blocks.0.hook_resid_post"
    plain = fit_features(model, sae, rows, hook_name=hook)
    more = fit_features(model, sae, rows, hook_name=hook, concepts=(*CONCEPTS, *words))
    assert any(fit.concept.kind == "word" for fit in more.features)
    assert more.without_words().features == plain.features


def test_cross_modal_truth_counts_both_sides(truth: Truth) -> None:
    found = cross_modal_truth(truth, min_fit=-1.0)
    assert found.n_live == len(truth.features)
    fires = [truth.tokens[modality].n_active(len(truth.precisions[modality])) > 0 for modality in truth.tokens]
    assert found.n_both == int((fires[0] & fires[1]).sum())
    assert not cross_modal_truth(truth, min_fit=1.01).found
    assert len(cross_modal_lines(found)) == len(found.found) + 2
