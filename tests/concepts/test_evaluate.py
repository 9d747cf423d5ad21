"""Measures are their formulas; the table has the rows it should, and skips with a reason."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.embedding import TextImageEmbedding
from sae_lens_multimodal.concepts.dictionary import ConceptDictionary, find_concepts
from sae_lens_multimodal.concepts.encoders import TokenEncoder
from sae_lens_multimodal.concepts.evaluate import FEW_STATES, _others, evaluate_concepts, texts_of
from sae_lens_multimodal.concepts.gather import gather_states
from sae_lens_multimodal.concepts.measures import (
    bert_score,
    coactivation,
    disentanglement,
    explained_variance,
    overlap,
    ratio_interval,
)
from sae_lens_multimodal.concepts.scorers import clip_scorer
from sae_lens_multimodal.concepts.states import ConceptStates
from sae_lens_multimodal.errors import ConfigError, ModelLoadError, SAEMismatchError
from sae_lens_multimodal.scenes import make_scene
from tests.concepts.concept_samples import HOOK, WORD


def tokenizer_of(model: VisionLanguageModel, **settings: Any) -> PreTrainedTokenizerFast:
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    backend = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    ends = [(token, backend.token_to_id(token)) for token in ("<bos>", "<eos>")]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        **names,
        **settings,
    )


@pytest.fixture(scope="module")
def encoder_folder(model: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    tokenizer = tokenizer_of(model)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(model: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = tokenizer_of(model, model_max_length=8)
    layer = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    words = {**layer, "vocab_size": len(tokenizer), "max_position_embeddings": 8, "eos_token_id": 2}
    vision = {**layer, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=6)).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size), tokenizer).save_pretrained(folder)
    return folder


class KnownScenes(TextImageEmbedding):
    """A space of texts and pictures that knows what is in the scenes."""

    words = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white", "circle", "square", "star", "cross")

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.name = "known"
        self._captions = {row["images"][0].tobytes(): row["messages"][1]["content"][0]["text"] for row in rows}

    def texts(self, texts: Any) -> Any:
        counts = np.array([[text.split().count(word) > 0 for word in self.words] for text in texts], dtype=float)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)

    def images(self, pictures: Any) -> Any:
        return self.texts([self._captions[picture.tobytes()] for picture in pictures])


class Listening(KnownScenes):
    """The same, and it keeps what it is asked."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.heard: list[list[str]] = []

    def texts(self, texts: Any) -> Any:
        self.heard.append(list(texts))
        return super().texts(texts)


def test_rows_of_methods_and_floors(
    model: VisionLanguageModel, rows: list[dict[str, Any]], states: ConceptStates, encoder_folder: Path
) -> None:
    noise = gather_states(model, rows, WORD, hook_name=HOOK, every=True, pictures="noise", progress=False)
    found = find_concepts(states, 5)
    space = KnownScenes(rows)
    table = evaluate_concepts(
        model,
        {"semi_nmf": found, "pca": find_concepts(states, 3, "pca")},
        states,
        dataset=rows,
        noise=noise,
        clip=space,
        bert=encoder_folder,
    )
    floors = ("", ", random words", ", another state's", ", noise images")
    assert list(table.rows) == [*(f"{name}{one}" for name in ("semi_nmf", "pca") for one in floors), "true captions"]
    assert table.skipped == {}
    assert table.rows["true captions"]["clip_score"] == pytest.approx(2.5)
    assert table.rows["true captions"]["bert_score"] == pytest.approx(1, abs=1e-5)
    own = texts_of(model, found, states.states, 3, 5)
    pictures = [rows[row]["images"][0] for row in states.rows]
    expected = 2.5 * np.maximum((space.texts(own) * space.images(pictures)).sum(1), 0).mean()
    assert table.rows["semi_nmf"]["clip_score"] == pytest.approx(expected)
    assert table.rows["semi_nmf"]["explained_variance"] == pytest.approx(
        explained_variance(states.states, found.decode(found.activations)), abs=1e-3
    )
    assert table.rows["pca"]["disentanglement"] == pytest.approx(1, abs=1e-4)
    encoder = TokenEncoder.load(encoder_folder)
    f1 = [bert_score(*encoder.tokens([a, b])).f1 for a, b in zip(own, states.captions, strict=True)]
    assert table.rows["semi_nmf"]["bert_score"] == pytest.approx(np.mean(f1), abs=1e-4)
    assert len(table.lines()) == 2 + len(table.rows)
    for name, row in table.rows.items():
        for measure, (low, high) in table.intervals[name].items():
            assert low <= row[measure] <= high or measure == "explained_variance"
    low, high = table.intervals["semi_nmf"]["clip_score"]
    assert low < table.rows["semi_nmf"]["clip_score"] < high
    # The text of another state is one of the texts, and not the state's own.
    captions = [states.captions[index] for index in _others(len(states), 0)]
    assert all(a != b for a, b in zip(_others(len(states), 0), range(len(states)), strict=True))
    assert sorted(captions) == sorted(states.captions)


def test_random_words_are_as_many_as_the_concepts_words(
    model: VisionLanguageModel, rows: list[dict[str, Any]], states: ConceptStates
) -> None:
    space = Listening(rows)
    evaluate_concepts(model, {"one": find_concepts(states, 5)}, states, dataset=rows, clip=space)
    own, random, other, _ = space.heard[-4:]
    assert [len(text.split()) for text in random] == [len(text.split()) for text in own]
    assert random != own
    assert sorted(other) == sorted(own)


def test_a_state_without_a_concept_scores_nothing(
    model: VisionLanguageModel, rows: list[dict[str, Any]], states: ConceptStates, encoder_folder: Path
) -> None:
    found = find_concepts(states, 5)
    silent = ConceptDictionary(-found.concepts * 0, found.activations, "simple")
    table = evaluate_concepts(model, {"a": silent}, states, dataset=rows, clip=KnownScenes(rows), bert=encoder_folder)
    assert (table.rows["a"]["clip_score"], table.rows["a"]["bert_score"]) == (0, 0)


def test_all_pictures_of_a_row_are_compared_and_few_are_held(
    model: VisionLanguageModel, rows: list[dict[str, Any]]
) -> None:
    space = KnownScenes(rows)
    pictures = [row["images"][0] for row in rows[:3]]
    of_row = {7: list(space.images(pictures[:2])), 9: list(space.images(pictures[2:]))}
    texts = ["red circle", "star", "blue"]
    found = clip_scorer(space, of_row, [7, 9, 8])(texts)
    vectors, words = space.images(pictures), space.texts(texts)
    assert found[0] == pytest.approx(2.5 * np.maximum(vectors[:2] @ words[0], 0).mean())
    assert found[1] == pytest.approx(2.5 * max(vectors[2] @ words[1], 0))
    assert np.isnan(found[2])


def test_a_row_that_no_longer_opens_is_left_out(
    model: VisionLanguageModel,
    rows: list[dict[str, Any]],
    states: ConceptStates,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gone = states.rows[0]
    changed = [
        {**row, "images": [{"bytes": b"none", "path": None}]} if i == gone else row for i, row in enumerate(rows)
    ]
    found = {"one": find_concepts(states, 5)}
    table = evaluate_concepts(model, found, states, dataset=changed, clip=KnownScenes(rows))
    assert table.rows["true captions"]["clip_score"] == pytest.approx(2.5)
    assert f"{states.rows.count(gone)} of {len(states)} states have no picture that opens" in caplog.text


def test_what_is_of_elsewhere_is_refused(model: VisionLanguageModel, states: ConceptStates) -> None:
    found = find_concepts(states, 3, "simple")
    for name in ("hook_name", "word", "model_name"):
        other = replace(found, **{name: "elsewhere"})  # type: ignore[arg-type]
        with pytest.raises(SAEMismatchError, match="elsewhere"):
            evaluate_concepts(model, {"one": other}, states)
    assert evaluate_concepts(model, {"one": replace(found, word=None)}, states).rows
    broken = replace(states, shard=replace(states.shard, states=states.states * torch.nan))
    with pytest.raises(ConfigError, match="hold NaN"):
        evaluate_concepts(model, {"one": found}, broken)


def test_noise_without_an_encoder_is_skipped_with_its_reason(model: VisionLanguageModel, states: ConceptStates) -> None:
    table = evaluate_concepts(model, {"one": find_concepts(states, 3, "simple")}, states, noise=states)
    assert table.skipped["noise images"] == "only CLIPScore and BERTScore are taken of them"


def test_few_states_are_warned_of(
    model: VisionLanguageModel, states: ConceptStates, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(states) < FEW_STATES
    evaluate_concepts(model, {"one": find_concepts(states, 3, "simple")}, states)
    assert f"{len(states)} states are few" in caplog.text


def test_intervals_are_those_of_a_mean_and_draw_whole_rows() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    low, high = ratio_interval(values, np.ones(400), np.arange(400))
    # A mean's interval is 1.96 standard errors on either side.
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high
    four = ratio_interval(np.repeat(values, 4), np.ones(1600), np.repeat(np.arange(400), 4))
    assert four == pytest.approx((low, high))


def test_the_layer_of_the_published_score(model: VisionLanguageModel, encoder_folder: Path, tmp_path: Path) -> None:
    first, last = (TokenEncoder.load(encoder_folder, layer=layer).tokens(["red circle"])[0] for layer in (1, -1))
    assert not torch.allclose(first, last, atol=1e-3)
    assert torch.equal(TokenEncoder.load(encoder_folder).tokens(["red circle"])[0], last)
    with pytest.raises(ConfigError, match="layer=9"):
        TokenEncoder.load(encoder_folder, layer=9)
    with pytest.raises(ConfigError, match="layer=9"):
        TokenEncoder.load(shutil.copytree(encoder_folder, tmp_path / "bert-base-uncased"))


def test_what_is_not_given_is_skipped_with_its_reason(model: VisionLanguageModel, states: ConceptStates) -> None:
    table = evaluate_concepts(model, {"simple": find_concepts(states, 3, "simple")}, states)
    assert set(table.skipped) == {"clip_score", "bert_score", "noise images"}
    assert "no CLIP or SigLIP was given" in table.skipped["clip_score"]
    assert set(table.rows) == {"simple"}
    assert table.lines()[-1].startswith("noise images: no states")


def test_a_clip_by_name(
    model: VisionLanguageModel, rows: list[dict[str, Any]], states: ConceptStates, clip_folder: Path
) -> None:
    found = {"random": find_concepts(states, 3, "random")}
    table = evaluate_concepts(model, found, states, dataset=rows, clip=clip_folder)
    assert 0 <= table.rows["true captions"]["clip_score"] <= 2.5
    assert set(table.skipped) == {"bert_score", "noise images"}


def test_the_words_are_those_of_the_strongest_concepts(model: VisionLanguageModel) -> None:
    unembedding = model._module.get_submodule(model.family.unembedding).weight.detach()
    ids = [model.tokenizer.convert_tokens_to_ids(word) for word in ("red", "blue", "star")]
    directions = unembedding[ids] / unembedding[ids].norm(dim=1, keepdim=True)
    found = ConceptDictionary(directions, torch.ones(1, 3), "semi_nmf")
    states = directions[[0, 2]] * 9 + directions[[1, 1]]
    assert texts_of(model, found, states, 1, 1) == ["red", "star"]
    assert texts_of(model, found, states, 2, 1)[0].split()[0] == "red"


def test_mistakes_are_told(
    model: VisionLanguageModel, rows: list[dict[str, Any]], states: ConceptStates, tmp_path: Path
) -> None:
    found = {"simple": find_concepts(states, 3, "simple")}
    with pytest.raises(ConfigError, match="no dictionaries"):
        evaluate_concepts(model, {}, states)
    with pytest.raises(ConfigError, match="needs the pictures"):
        evaluate_concepts(model, found, states, clip=KnownScenes(rows))
    with pytest.raises(ModelLoadError, match="expected a text encoder"):
        evaluate_concepts(model, found, states, bert=tmp_path)
    with pytest.raises(ConfigError, match="The states with noise have none of row"):
        evaluate_concepts(model, found, states, noise=states.split(0.5)[0], dataset=rows, clip=KnownScenes(rows))


def test_padding_changes_no_tokens_vector(encoder_folder: Path) -> None:
    encoder = TokenEncoder.load(encoder_folder)
    encoder.tokenizer.padding_side = "left"
    (alone,) = encoder.tokens(["red circle"])
    beside = encoder.tokens(["red circle", "a blue square and a star"])
    assert torch.allclose(beside[0], alone, atol=1e-5)
    assert [len(one) for one in beside] == [2, 6]
    assert torch.allclose(alone.norm(dim=1), torch.ones(2), atol=1e-5)
    # Of <bos> red circle <eos> the words alone are there, read with the ends beside them.
    ids = encoder.tokenizer(["red circle"], return_tensors="pt")
    assert ids["input_ids"].shape == (1, 4)
    with torch.no_grad():
        expected = encoder.model(**ids).last_hidden_state[0, 1:3]
    assert torch.allclose(alone, expected / expected.norm(dim=1, keepdim=True), atol=1e-5)


def test_greedy_matching_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (3, 4))
    precision = sum(max(float(x @ y) for y in b) for x in a) / 3
    recall = sum(max(float(x @ y) for x in a) for y in b) / 4
    found = bert_score(a, b)
    assert found.precision == pytest.approx(precision)
    assert found.recall == pytest.approx(recall)
    assert found.f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert bert_score(a[:0], b).f1 == 0


def test_small_measures() -> None:
    assert overlap([["a", "b"], ["B", "c"], []]) == 0.5
    assert overlap([["a"]]) == 0.0
    assert disentanglement(torch.tensor([[1.0, 0.0], [1.0, 1.0]])) == pytest.approx(1 - 0.5**0.5)
    activations = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [3.0, 6.0, 0.0]])
    assert coactivation(activations) == pytest.approx(1)
    states = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assert explained_variance(states, states) == pytest.approx(1)
    assert explained_variance(states, states.mean(0).expand_as(states)) == pytest.approx(0, abs=1e-6)


def test_pictures_are_those_of_the_rows(rows: list[dict[str, Any]]) -> None:
    import datasets

    from sae_lens_multimodal.concepts.ground import rows_at

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    plain = [{"image": row["images"][0], "caption": f"row {index}"} for index, row in enumerate(rows)]
    whole = datasets.Dataset.from_list(plain, features=features)
    for source in (plain, whole, whole.to_iterable_dataset()):
        found = rows_at(source, [5, 2, 5])
        assert list(found) == [2, 5]
        assert found[5].row == 5
        assert found[5].images[0].tobytes() == rows[5]["images"][0].convert("RGB").tobytes()
    assert make_scene(2**41 + 5).image.size == rows[5]["images"][0].size
