"""Weighing several explanations: the right one is kept, on examples of its own; and the published procedure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sae_lens import StandardSAE, StandardSAEConfig

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.contrastive import Contrastive
from sae_lens_multimodal.autointerp.embedding import tower_embedding
from sae_lens_multimodal.autointerp.explain import explain
from sae_lens_multimodal.autointerp.explanation import Explanation, Shown, read_explanations
from sae_lens_multimodal.autointerp.general_prompts import GeneralPrompts
from sae_lens_multimodal.autointerp.judges import FailureKind, JudgeFailure, JudgeRequest, ScriptedJudge
from sae_lens_multimodal.autointerp.negatives import HardNegatives, decoder_neighbours
from sae_lens_multimodal.autointerp.places import strongest_spots
from sae_lens_multimodal.autointerp.procedures import Procedure, Published, base_view_mean, lit_picture
from sae_lens_multimodal.autointerp.prompts import Meaning
from sae_lens_multimodal.autointerp.regions import crop, find_regions
from sae_lens_multimodal.autointerp.results import read_verdicts
from sae_lens_multimodal.autointerp.score import score
from sae_lens_multimodal.autointerp.selection import split_examples
from sae_lens_multimodal.autointerp.styles import RegionStyle
from sae_lens_multimodal.errors import ConfigError, StoreError
from sae_lens_multimodal.features.describe import describe_features
from sae_lens_multimodal.features.picture_vectors import PictureVectors
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book
from sae_lens_multimodal.scenes.questions import COMMON_QUESTION, MARKS_QUESTION
from tests.autointerp.sample import COLOURS, HOOK, TEXT_FEATURE, perfect, seen_colours

BOOK = scenes_prompt_book()


def run(
    store: FeatureStore, answer: Callable[[JudgeRequest], str | JudgeFailure], output: Path, **options: Any
) -> list[Explanation]:
    given: dict[str, Any] = {"prompts": BOOK, "procedure": Contrastive(), **options}
    return explain(store, ScriptedJudge(answer), output=output, progress=False, **given)


def is_proposal(request: JudgeRequest) -> bool:
    question = str(request.parts[-1])
    return question == COMMON_QUESTION or question.endswith(MARKS_QUESTION)


def proposing(phrase: str) -> Callable[[JudgeRequest], str]:
    """Propose always the same, and judge by colours; what has more words than a colour is never there."""

    def answer(request: JudgeRequest) -> str:
        if is_proposal(request):
            return phrase
        asked = str(request.parts[-1]).removeprefix("does this show ").split("show ")[-1].removesuffix(" ?")
        return perfect(request) if asked in COLOURS else "no"

    return answer


def test_known_features_are_explained_rightly_on_three_parts(store: FeatureStore, tmp_path: Path) -> None:
    found = run(store, perfect, tmp_path / "out")
    assert [(one.feature, one.text) for one in found] == [*enumerate(COLOURS), (TEXT_FEATURE, "red")]
    assert read_explanations(tmp_path / "out") == found
    scores = score(store, ScriptedJudge(perfect), found, output=tmp_path / "scores", prompts=BOOK, progress=False)
    assert all(one.n > 0 for one in scores if one.scorer == "detection")
    by_feature = {one.feature: one for one in found}
    for one in found:
        assert one.procedure == "contrastive"
        assert one.validation is not None
        assert one.validation >= 0.9
        assert {item.active for item in one.validated_on} == {True, False}
    for verdict in read_verdicts(tmp_path / "scores"):
        own = by_feature[verdict.feature]
        assert verdict.prompt_id not in {shown.prompt_id for shown in (*own.shown, *own.validated_on)}
        assert set(store.prompt(verdict.prompt_id).image_ids).isdisjoint(own.image_ids)


def test_the_three_parts_share_no_prompt_and_no_picture(store: FeatureStore) -> None:
    for feature in range(5):
        modality: Any = "text" if feature == TEXT_FEATURE else "image"
        rng = np.random.default_rng(feature)
        split = split_examples(store, feature, modality, n_explain=9, n_validate=9, n_silent=9, rng=rng)
        firing = len(store.examples(feature, "top", modality)) + len(store.examples(feature, "ordinary", modality))
        assert 0 < len(split.explain) <= firing // 3
        assert 0 < len(split.validate.firing) <= firing // 3
        parts = [[*split.explain, *split.explain_silent], [*split.validate.firing, *split.validate.silent]]
        prompts, images = ([{e.prompt_id for e in part} for part in parts], [_images(part) for part in parts])
        assert prompts[0].isdisjoint(prompts[1])
        assert images[0].isdisjoint(images[1])


def _images(examples: list[Any]) -> set[str]:
    return {name for example in examples for name in example.image_ids}


def test_of_several_the_one_that_holds_is_kept(store: FeatureStore, tmp_path: Path) -> None:
    (found,) = run(store, proposing("red striped circle"), tmp_path / "out", features=[0])
    assert found.text == "red"
    assert [one.text for one in found.candidates] == [
        "red striped circle",
        "red striped",
        "red circle",
        "striped circle",
        "red",
        "striped",
        "circle",
    ]
    accuracy = {one.text: one.validation for one in found.candidates}
    assert accuracy["red striped circle"] == 0.5
    tried = {one.text: one.n for one in found.candidates}
    assert tried["red"] == len(found.validated_on) > tried["circle"] == tried["red striped circle"]
    assert [one.confirmation for one in found.candidates if one.text != "red"] == [None] * 6
    assert found.validation is not None
    assert found.validation >= 0.9


def test_what_it_was_chosen_by_does_not_confirm_it(store: FeatureStore, tmp_path: Path) -> None:
    """A judge that is right about all that a candidate is chosen by, and wrong about all the rest."""
    (right,) = run(store, perfect, tmp_path / "right", features=[0])
    chosen_by = {(one.prompt_id, one.box) for one in right.validated_on[::2]}
    seen: list[JudgeRequest] = []

    def lucky(request: JudgeRequest) -> str:
        if is_proposal(request):
            return "red"
        seen.append(request)
        truth = perfect(request)
        return truth if len(seen) <= len(chosen_by) else {"yes": "no", "no": "yes"}[truth]

    (found,) = run(store, lucky, tmp_path / "lucky", features=[0])
    (candidate,) = found.candidates
    assert candidate.validation is not None
    assert candidate.validation >= 0.9
    assert candidate.confirmation is not None
    assert candidate.confirmation <= 0.1
    assert (found.status, found.text) == ("nothing in common", "")


def test_what_holds_nowhere_is_no_explanation(store: FeatureStore, tmp_path: Path) -> None:
    (found,) = run(store, lambda r: "blue" if is_proposal(r) else "no", tmp_path / "out", features=[0])
    assert (found.status, found.text) == ("nothing in common", "")
    assert [one.validation for one in found.candidates] == [0.5], "it stays on record, with how it did"
    (nothing,) = run(store, lambda _: "nothing", tmp_path / "none", features=[0])
    assert (nothing.status, nothing.candidates) == ("nothing in common", ())


def test_the_search_ends_when_one_is_good_enough(store: FeatureStore, tmp_path: Path) -> None:
    judge = ScriptedJudge(perfect)
    explain(store, judge, output=tmp_path / "a", features=[0], prompts=BOOK, procedure=Contrastive(), progress=False)
    assert sum(map(is_proposal, judge.requests)) == 1
    judge = ScriptedJudge(lambda r: "blue" if is_proposal(r) else "no")
    many = Contrastive(n_rounds=3)
    explain(store, judge, output=tmp_path / "b", features=[0], prompts=BOOK, procedure=many, progress=False)
    assert sum(map(is_proposal, judge.requests)) == 3
    assert len({request.digest for request in judge.requests if is_proposal(request)}) > 1, "other examples"


def test_failures_are_typed_and_count_as_wrong(store: FeatureStore, tmp_path: Path) -> None:
    (found,) = run(store, lambda _: "lovely pictures", tmp_path / "out", features=[0])
    assert found.status == "failed"
    assert found.failure is not None
    assert found.failure.kind is FailureKind.UNPARSABLE

    def mute(request: JudgeRequest) -> str | JudgeFailure:
        return "red" if is_proposal(request) else JudgeFailure.of(request, FailureKind.TIMEOUT, "late")

    (found,) = run(store, mute, tmp_path / "mute", features=[0])
    assert found.text == "", "no answer is no support"
    (candidate,) = found.candidates
    assert (candidate.validation, candidate.n_failed) == (0.0, candidate.n)
    assert found.failure is not None, "no answer is no refutation either"
    assert found.failure.kind is FailureKind.TIMEOUT


def test_general_book_asks_for_several_and_reads_them(store: FeatureStore, tmp_path: Path) -> None:
    texts = ["round things", "red things", "things"]
    proposals = json.dumps({"common": True, "candidates": [{"explanation": t, "label": t} for t in texts]})

    def answer(request: JudgeRequest) -> str:
        if "candidates" in request.text:
            return proposals
        if "red things" in request.text:
            return '{"answer": "yes"}' if "red" in seen_colours(request.pictures[0]) else '{"answer": "no"}'
        return '{"answer": "yes"}'

    (found,) = run(store, answer, tmp_path / "out", features=[0], prompts=GeneralPrompts())
    assert (found.text, found.label) == ("red things", "red things")
    assert [one.validation for one in found.candidates if one.text != "red things"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"common": false, "candidates": []}', []),
        ('{"common": false}', []),
        ('Well: {"common": true, "candidates": [{"explanation": "a  b", "label": ""}]}', [Meaning("a b", "a b")]),
        ('{"common": true, "candidates": []}', None),
        ('{"common": true, "candidates": [{"explanation": ""}]}', None),
        ('{"common": true, "candidates": ["red"]}', None),
        ('{"common": true, "candidates": "red"}', None),
        ('{"common": "true", "candidates": []}', None),
        ("red things", None),
    ],
)
def test_proposals_are_read_or_refused_never_guessed(reply: str, expected: list[Meaning] | None) -> None:
    assert GeneralPrompts().read_proposals(reply) == expected


def test_hard_negatives_are_silent_and_of_every_kind(store: FeatureStore) -> None:
    firing, silent = store.examples(0, "top", "image"), store.examples(0, "silent", "image")
    finder = HardNegatives(store, neighbours={0: [1, 99]})
    found = finder.find(0, firing, silent, 12, style=RegionStyle(margin_pixels=0), rng=np.random.default_rng(0))
    assert {place.source for place in found} == {"same picture", "neighbour", "similar"}
    for place in found:
        shown = crop(place.example.images[place.region.image], place.region, RegionStyle(margin_pixels=0))
        assert "red" not in seen_colours(shown, share=0.15), place.source
        if place.source == "neighbour":
            assert "green" in seen_colours(shown)


def test_of_silent_pictures_what_looks_alike_is_taken(store: FeatureStore) -> None:
    firing, silent = store.examples(0, "top", "image"), store.examples(0, "silent", "image")

    def embed(pictures: Any) -> Any:
        # red and orange lie close to each other, blue lies across
        return np.stack([np.asarray(one.convert("RGB"), dtype=float).mean(axis=(0, 1)) - 100 for one in pictures])

    style = RegionStyle(margin_pixels=0)
    options: dict[str, Any] = {"style": style, "rng": np.random.default_rng(0)}
    near = [
        p for p in HardNegatives(store, embed=embed).find(0, firing, silent, 40, **options) if p.source == "similar"
    ]
    regions = [(one, find_regions(one)[0]) for one in firing]
    where = embed([crop(one.images[r.image], r, style) for one, r in regions]).mean(axis=0)

    def nearness(place: Any) -> float:
        (vector,) = embed([crop(place.example.images[0], place.region, style)])
        return float(vector @ where / np.linalg.norm(vector) / np.linalg.norm(where))

    order = [nearness(place) for place in near]
    assert order == sorted(order, reverse=True) or np.allclose(order, sorted(order, reverse=True), atol=0.1)
    assert len(near) == len({place.example.prompt_id for place in near}) > 2


def test_decoder_neighbours_are_nearest_by_cosine() -> None:
    decoder = torch.tensor([[1.0, 0.0], [5.0, 0.5], [0.0, 1.0], [-1.0, -0.5]])
    sae: Any = SimpleNamespace(W_dec=decoder)
    assert decoder_neighbours(sae, [0, 2], count=2) == {0: [1, 2], 2: [1, 0]}


def test_published_procedure_shows_lit_pictures_and_no_text(store: FeatureStore, tmp_path: Path) -> None:
    judge = ScriptedJudge(lambda _: "red")
    options: dict[str, Any] = {"prompts": BOOK, "modality": "both", "progress": False}
    (found,) = explain(
        store, judge, output=tmp_path / "out", features=[0, TEXT_FEATURE], procedure=Published(), **options
    )
    assert (found.feature, found.modality, found.procedure, found.text) == (0, "image", "published", "red")
    (request,) = judge.requests
    assert len(request.pictures) == 5
    listed = [*store.examples(0, "top", "image"), *store.examples(0, "ordinary", "image")]
    best = sorted(listed, key=base_view_mean, reverse=True)[:5]
    assert [one.prompt_id for one in found.shown] == [one.prompt_id for one in best]
    first = best[0]
    shown, whole = np.asarray(request.pictures[0]), np.asarray(first.images[0])
    fires = first.heatmap(0, "base") > 0
    np.testing.assert_array_equal(shown[fires], whole[fires])
    np.testing.assert_allclose(shown[~fires], 0.35 * whole[~fires], atol=1.01)
    assert lit_picture(first, dimmed_to=0.35).size == first.images[0].size


def test_base_view_mean_counts_base_tokens_alone(store: FeatureStore) -> None:
    example = store.examples(1, "top", "image")[0]
    base = example.layout.tile[0].numpy() == 0
    assert base_view_mean(example) == pytest.approx(example.activations[base].sum() / base.sum())


def test_other_procedures_are_other_settings(store: FeatureStore, tmp_path: Path) -> None:
    run(store, perfect, tmp_path / "out", features=[0])
    with pytest.raises(StoreError, match="other settings"):
        run(store, perfect, tmp_path / "out", features=[0], procedure=Published())
    with pytest.raises(StoreError, match="procedure"):
        run(store, perfect, tmp_path / "out", features=[0], procedure=Contrastive(n_rounds=5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Contrastive(n_rounds=0),
        lambda: Contrastive(least=1.5),
        lambda: Published(n_pictures=0),
        lambda: Published(dimmed_to=1.0),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Callable[[], Procedure]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_explanations_of_before_keep_their_names() -> None:
    old = {"feature": 3, "text": "red", "label": "red", "modality": "image", "judge": "m", "prompts": "p"}
    old |= {"shown": [], "image_ids": [], "failure": None}
    one = Explanation.from_json(old)
    assert one.to_json() == old | {"shown": (), "image_ids": ()}
    chosen = Explanation(feature=3, text="red", validated_on=(Shown(prompt_id=1, active=True),))
    assert chosen.digest != Explanation(feature=3, text="red").digest
    assert Explanation.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen


def test_wider_phrases_come_most_words_first() -> None:
    assert [one.text for one in BOOK.variants(Meaning("red circle", ""))] == ["red", "circle"]
    assert BOOK.variants(Meaning("letter x", "")) == []
    assert GeneralPrompts().variants(Meaning("red circle", "")) == []


def test_blank_picture_embeds_without_a_warning(store: FeatureStore) -> None:
    firing, silent = store.examples(0, "top", "image"), store.examples(0, "silent", "image")

    def blank(pictures: Any) -> Any:
        return np.zeros((len(pictures), 3))

    finder = HardNegatives(store, embed=blank)
    assert finder.find(0, firing, silent, 3, style=RegionStyle(), rng=np.random.default_rng(0))
    assert isinstance(firing[0].images[0], Image.Image)


@pytest.fixture(scope="module")
def described(
    store: FeatureStore, model: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    """The same store with what the vision tower makes of its pictures; the SAE's directions are arbitrary."""
    copy = tmp_path_factory.mktemp("described") / "store"
    shutil.copytree(store.folder, copy)
    torch.manual_seed(0)
    config = StandardSAEConfig(d_in=model.d_model, d_sae=store.d_sae)
    config.metadata.hook_name, config.metadata.model_name = HOOK, str(model.name)
    return describe_features(model, StandardSAE(config), copy, progress=False)


def test_without_an_embedding_the_models_own_tower_finds_what_looks_alike(
    store: FeatureStore, described: FeatureStore, model: VisionLanguageModel
) -> None:
    assert store.picture_vectors is None
    embed, style = tower_embedding(model), RegionStyle(margin_pixels=0)

    def likeness(known: FeatureStore, feature: int) -> float:
        """Mean cosine of the silent regions that are taken first with where the feature fires, by their crops."""
        firing, silent = known.examples(feature, "top", "image"), known.examples(feature, "silent", "image")
        found = HardNegatives(known).find(feature, firing, silent, 40, style=style, rng=np.random.default_rng(0))
        similar = [place for place in found if place.source == "similar"][:3]
        places = [*strongest_spots(firing), *((place.example, place.region) for place in similar)]
        vectors = embed([crop(one.images[region.image], region, style) for one, region in places])
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return float((unit[len(firing) :] @ unit[: len(firing)].mean(axis=0)).mean())

    gains = [likeness(described, feature) - likeness(store, feature) for feature in range(len(COLOURS))]
    assert np.mean(gains) > 0.02, gains


def test_the_tower_is_asked_in_explaining_unless_an_embedding_is_given(
    described: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = PictureVectors.region

    def region(self: PictureVectors, image_id: str, *arguments: Any) -> Any:
        asked.append(image_id)
        return real(self, image_id, *arguments)

    monkeypatch.setattr(PictureVectors, "region", region)
    run(described, perfect, tmp_path / "own", features=[0])
    assert asked
    asked.clear()
    given = Contrastive(embed=lambda pictures: np.ones((len(pictures), 3)), embed_name="ones")
    run(described, perfect, tmp_path / "given", features=[0], procedure=given)
    assert asked == []


def test_described_stores_give_neighbours_and_are_another_setting(
    store: FeatureStore, described: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    real = HardNegatives._firing_examples
    monkeypatch.setattr(HardNegatives, "_firing_examples", lambda self, one: looked.append(one) or real(self, one))
    run(described, perfect, tmp_path / "out", features=[0])
    known = described.description(0)
    assert known is not None
    assert {one.feature for one in known.neighbours} == set(looked)
    with pytest.raises(StoreError, match="described was True, now False"):
        run(store, perfect, tmp_path / "out", features=[0])
