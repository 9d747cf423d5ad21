"""A dictionary does what an SAE does: saved, harvested, steered, attributed, reported; and it names its concepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.autointerp.explain import explain
from sae_lens_multimodal.autointerp.judges import ScriptedJudge
from sae_lens_multimodal.autointerp.score import score
from sae_lens_multimodal.concepts.decompose import Method
from sae_lens_multimodal.concepts.dictionary import ConceptDictionary, find_concepts
from sae_lens_multimodal.concepts.ground import ground_concepts
from sae_lens_multimodal.concepts.states import ConceptStates
from sae_lens_multimodal.data.rows import row_to_prompt
from sae_lens_multimodal.errors import ConfigError, FeatureError, SAEMismatchError, StoreError
from sae_lens_multimodal.features.harvest import harvest
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.hooks.attribute import attribute
from sae_lens_multimodal.hooks.attribution_check import check_attribution
from sae_lens_multimodal.hooks.changes import Add, Set
from sae_lens_multimodal.hooks.effects import output_logits
from sae_lens_multimodal.hooks.load_sae import load_sae
from sae_lens_multimodal.hooks.metrics import ContinuationLogProbability
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.steer import steer
from sae_lens_multimodal.hooks.trace_corruptions import ReplaceTokens
from sae_lens_multimodal.hooks.trace_story import trace_features
from sae_lens_multimodal.report.build import build_report
from tests.concepts.concept_samples import HOOK, planted
from tests.hooks.hook_samples import build_sae


@pytest.fixture(scope="module")
def dictionary(states: ConceptStates) -> ConceptDictionary:
    return find_concepts(states, 6)


@pytest.mark.parametrize("method", ["semi_nmf", "pca", "kmeans", "simple", "random"])
def test_the_sae_is_the_dictionary(method: Method, states: ConceptStates, tmp_path: Path) -> None:
    found = find_concepts(states, 5, method)
    found.save(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    assert sae.cfg.metadata.hook_name == HOOK
    assert sae.cfg.d_sae == found.k == (10 if method == "pca" else 5)
    assert torch.allclose(sae.encode(states.states), found.activations, atol=1e-2)
    assert torch.allclose(sae.decode(found.activations), found.decode(found.activations), atol=1e-3)
    again = ConceptDictionary.load(tmp_path)
    assert torch.equal(again.activations, found.activations)
    assert (again.method, again.rows, again.word, again.objective) == (method, found.rows, "circle", found.objective)


def test_features_of_an_sae_stay_that_saes(tmp_path: Path) -> None:
    sae = build_sae("jumprelu")
    states = torch.randn(30, 48, generator=torch.Generator().manual_seed(0))
    found = find_concepts(states, 4, "sae", sae=sae)
    found.save(tmp_path)
    assert torch.allclose(ConceptDictionary.load(tmp_path, sae=sae).encode(states), found.activations)
    with pytest.raises(ConfigError, match="load them with"):
        ConceptDictionary.load(tmp_path).encode(states)
    with pytest.raises(ConfigError, match="use that SAE with features"):
        found.to_sae()


def test_both_ends_of_a_component_have_words_and_rows(model: VisionLanguageModel, states: ConceptStates) -> None:
    found = find_concepts(states, 3, "pca")
    assert found.k == len(found.words(model, 2)) == found.activations.shape[1] == 6
    assert (found.activations >= 0).all()
    assert torch.equal(found.concepts[3:], -found.concepts[:3])
    projected = (states.states - states.states.mean(0)) @ found.concepts[0]
    assert found.top_states(0, 1)[0][0] == states.rows[int(projected.argmax())]
    assert found.top_states(3, 1)[0][0] == states.rows[int(projected.argmin())]
    assert torch.allclose(found.encode(states.states), found.activations, atol=1e-4)


def test_an_offset_is_the_saes_decoder_bias(states: ConceptStates, tmp_path: Path) -> None:
    found = find_concepts(states, 4, offset=True)
    found.save(tmp_path)
    sae = load_sae(tmp_path)
    assert found.bias is not None
    assert torch.allclose(sae.b_dec, found.bias)
    assert torch.allclose(sae.encode(states.states), found.encode(states.states), atol=1e-3)
    assert torch.allclose(sae(states.states), found.decode(found.encode(states.states)), atol=1e-3)


def test_another_method_leaves_nothing_of_the_first(states: ConceptStates, tmp_path: Path) -> None:
    find_concepts(states, 3).save(tmp_path)
    assert load_sae(tmp_path).cfg.d_sae == 3
    trained = build_sae("standard", d_in=states.states.shape[1])
    find_concepts(states, 2, "sae", sae=trained).save(tmp_path)
    with pytest.raises(StoreError, match="cannot be read"):
        load_sae(tmp_path)
    assert ConceptDictionary.load(tmp_path, sae=trained).k == 2
    trained.save_model(tmp_path / "trained")
    with pytest.raises(StoreError, match="no concept dictionary"):
        find_concepts(states, 3).save(tmp_path / "trained")
    assert load_sae(tmp_path / "trained").cfg.d_sae == trained.cfg.d_sae


def test_a_save_that_was_killed_can_be_done_again(
    states: ConceptStates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_concepts(states, 3)
    with monkeypatch.context() as patch:
        patch.setattr("sae_lens_multimodal.concepts.dictionary.write_json", None)
        with pytest.raises(TypeError):
            found.save(tmp_path)
    with pytest.raises(StoreError):
        ConceptDictionary.load(tmp_path)
    found.save(tmp_path)
    assert ConceptDictionary.load(tmp_path).k == 3


def test_dictionaries_and_states_can_be_compared(dictionary: ConceptDictionary, states: ConceptStates) -> None:
    assert dictionary == dictionary
    assert dictionary != ConceptDictionary.load
    assert states != states.split(0.5)[0]


def test_harvest_and_report_take_it(
    model: VisionLanguageModel, rows: list[dict[str, Any]], dictionary: ConceptDictionary, tmp_path: Path
) -> None:
    sae = dictionary.to_sae()
    store = harvest(model, sae, rows[:8], tmp_path / "store", n_top=2, n_ordinary=1, n_silent=1, progress=False)
    store.check_sae(dictionary.to_sae())
    assert store.d_sae == 6
    example = store.examples(store.features[0], "top", "text")[0]
    batch = model.encode([row_to_prompt(rows[example.prompt.prompt_id]).messages])
    codes = dictionary.encode(read_activations(model, batch, HOOK)[HOOK][0])[:, example.feature]
    assert torch.allclose(codes[example.positions], torch.from_numpy(example.values.copy()), atol=1e-2)
    index = build_report(FeatureStore.open(tmp_path / "store"), output=tmp_path / "report")
    assert index.is_file()


def test_autointerp_takes_it(
    model: VisionLanguageModel, rows: list[dict[str, Any]], dictionary: ConceptDictionary, tmp_path: Path
) -> None:
    dictionary.save(tmp_path / "concepts")
    sae = load_sae(tmp_path / "concepts")
    store = harvest(model, sae, rows, tmp_path / "store", n_top=6, n_ordinary=2, n_silent=4, progress=False)
    said = json.dumps({"common": True, "explanation": "the texture of a thing", "label": "texture"})
    judge = ScriptedJudge(lambda request: said if '"common"' in request.text else '{"answer": "yes"}')
    made = explain(store, judge, output=tmp_path / "explained", features=[0, 1], progress=False)
    assert [(one.feature, one.text) for one in made] == [(0, "the texture of a thing"), (1, "the texture of a thing")]
    found = score(store, judge, made, output=tmp_path / "scored", progress=False)
    assert {(one.feature, one.scorer) for one in found} == {
        (k, name) for k in (0, 1) for name in ("detection", "fuzzing")
    }
    # a judge that always says yes
    measured = [(one.tpr, one.fpr, one.balanced_accuracy) for one in found if not one.note]
    assert len(measured) >= 2
    assert set(measured) == {(1.0, 1.0, 0.5)}


def test_a_trace_names_concepts(
    model: VisionLanguageModel, rows: list[dict[str, Any]], dictionary: ConceptDictionary
) -> None:
    clean = row_to_prompt(rows[0]).messages[:1]
    found = trace_features(
        model, dictionary.to_sae(), clean, ReplaceTokens([-3], seed=1), positions="last", min_gap=None, n_features=2
    )
    assert found.hook_name == HOOK
    assert found.n_active >= 1
    assert {one.feature for one in found.features} <= set(range(dictionary.k))


def test_steering_adds_the_concept(
    model: VisionLanguageModel, rows: list[dict[str, Any]], dictionary: ConceptDictionary
) -> None:
    batch = model.encode([row_to_prompt(rows[0]).messages])
    before = read_activations(model, batch, HOOK)[HOOK]
    sae = dictionary.to_sae()
    added = read_activations(steer(model, sae, {2: Add(3.0)}), batch, HOOK)[HOOK]
    assert torch.allclose(added - before, (3.0 * dictionary.concepts[2]).expand_as(before), atol=1e-4)
    fixed = read_activations(steer(model, sae, {2: Set(4.0)}), batch, HOOK)[HOOK]
    expected = before + (4.0 - sae.encode(before)[..., 2:3]) * dictionary.concepts[2]
    assert torch.allclose(fixed, expected, atol=1e-3)


def test_attribution_takes_it_and_ranks_true_ablations(
    model: VisionLanguageModel, rows: list[dict[str, Any]], dictionary: ConceptDictionary
) -> None:
    question = row_to_prompt(rows[0]).messages[:1]
    sae = dictionary.to_sae()
    found = attribute(model, sae, question, ContinuationLogProbability("red"), tokens="text")
    assert found.n_nodes > 0
    check = check_attribution(model, sae, found, n=12)
    assert check.spearman > 0.7


def test_gradients_flow_through_the_sae(dictionary: ConceptDictionary, states: ConceptStates) -> None:
    x = states.states.clone().requires_grad_()
    sae = dictionary.to_sae()
    (sae(x) - x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_words_are_those_of_the_unembedding(model: VisionLanguageModel, dictionary: ConceptDictionary) -> None:
    logits = output_logits(model, dictionary.concepts)
    special = set(model.tokenizer.all_special_ids)
    for own, row in zip(dictionary.words(model, 4), logits, strict=True):
        ids = [index for index in row.argsort(descending=True).tolist() if index not in special]
        tokens = [model.tokenizer.convert_ids_to_tokens(index) for index in ids]
        assert [word for word, _ in own] == [token for token in tokens if token.isalpha()][:4]


def test_contrast_takes_off_what_concepts_share(model: VisionLanguageModel, states: ConceptStates) -> None:
    shared = states.states.mean(0)
    ids = {word: model.tokenizer.convert_tokens_to_ids(word) for word in ("red", "blue")}
    unembedding = model._module.get_submodule(model.family.unembedding).weight
    directions = torch.stack([shared + 3 * unembedding[i] / unembedding[i].norm() for i in ids.values()]).detach()
    found = ConceptDictionary(directions, torch.ones(1, 2), "semi_nmf")
    assert [own[0][0] for own in found.words(model, 3, contrast=True)] == ["red", "blue"]


def test_words_need_the_residual_stream(model: VisionLanguageModel) -> None:
    with pytest.raises(SAEMismatchError, match="width 48"):
        find_concepts(planted(0)[0], 3).words(model)
    with pytest.raises(ConfigError, match="n=0"):
        find_concepts(torch.randn(9, model.d_model), 3).words(model, 0)


def test_the_strongest_rows_each_once() -> None:
    activations = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 5.0], [9.0, 0.0]])
    found = ConceptDictionary(torch.eye(2), activations, "semi_nmf", rows=(4, 4, 7, 9))
    assert found.top_states(0, 2) == [(9, 9.0), (4, 3.0)]
    assert found.top_states(1) == [(7, 5.0)]
    with pytest.raises(FeatureError, match="concept 2"):
        found.top_states(2)


def test_grounding_shows_rows_and_patches(
    model: VisionLanguageModel, rows: list[dict[str, Any]], dictionary: ConceptDictionary
) -> None:
    found = ground_concepts(model, dictionary, rows, concepts=[1], n_rows=2, n_patches=3, batch_size=1)[1]
    assert [(one.row, one.activation) for one in found] == dictionary.top_states(1, 2)
    one = found[0]
    batch = model.encode([row_to_prompt(rows[one.row]).messages])
    at = batch.layout.is_image[0]
    codes = dictionary.encode(read_activations(model, batch, HOOK)[HOOK][0][at])[:, 1]
    assert one.images[0].size == rows[one.row]["images"][0].size
    assert one.patches
    top = codes.argsort(descending=True)[: len(one.patches)].tolist()
    assert torch.allclose(torch.tensor([patch.activation for patch in one.patches]), codes[top], atol=1e-3)
    assert tuple(one.patches[0].box) == pytest.approx(batch.layout.boxes[0][at][top[0]].tolist())
    with pytest.raises(ConfigError, match="hook and rows"):
        ground_concepts(model, find_concepts(planted(0)[0], 3), rows)


def test_other_folders_are_refused(tmp_path: Path, dictionary: ConceptDictionary) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        ConceptDictionary.load(tmp_path / "none")
    dictionary.save(tmp_path)
    (tmp_path / "concepts.safetensors").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="cannot be read"):
        ConceptDictionary.load(tmp_path)
