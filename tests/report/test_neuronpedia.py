"""The export for Neuronpedia against the fields of its own code, and the numbers against the store's."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_lens_multimodal.errors import ConfigError, StoreError
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.report.neuronpedia import export_neuronpedia
from sae_lens_multimodal.report.neuronpedia_heads import NeuronpediaNames
from sae_lens_multimodal.report.neuronpedia_rows import spelt_tokens
from sae_lens_multimodal.report.records import Run
from tests.report.report_sample import EVIL_END, HALF, TEXT_FEATURE, explanations, scores, verdicts

# The fields of SAEDashboard's dataclasses, which Neuronpedia's importer is fed with
# (github.com/jbloomAus/SAEDashboard, sae_dashboard/neuronpedia/neuronpedia_export.py, db4839a).
SAE_DASHBOARD = {
    "release": "name description creatorName creatorId visibility isNewUi featured descriptionShort urls creatorEmail "
    "creatorNameShort defaultSourceSetName defaultSourceId defaultUmapSourceIds createdAt",
    "model": "id instruct creatorId displayNameShort displayName tlensId dimension visibility defaultSourceSetName "
    "defaultSourceId inferenceEnabled layers neuronsPerLayer createdAt owner updatedAt website",
    "sourceset": "modelId name creatorId hasDashboards visibility description type creatorName urls creatorEmail "
    "releaseName defaultOfModelId defaultRange defaultShowBreaks showDfa showCorrelated showHeadAttribution showUmap "
    "createdAt",
    "source": "id modelId setName creatorId hasDashboards inferenceEnabled inferenceHosts saelensConfig saelensRelease "
    "saelensSaeId hfRepoId hfFolderId visibility defaultOfModelId hasUmap hasUmapLogSparsity hasUmapClusters "
    "num_prompts num_tokens_in_prompt dataset notes createdAt",
    "features": "modelId layer index creatorId createdAt maxActApprox hasVector vector vectorLabel "
    "vectorDefaultSteerStrength hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices "
    "neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices correlated_neurons_pearson "
    "correlated_neurons_l1 correlated_features_indices correlated_features_pearson correlated_features_l1 neg_str "
    "neg_values pos_str pos_values frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values "
    "logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist sourceSetName",
    "activations": "id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource "
    "dataIndex dfaValues dfaTargetIndex dfaMaxValue createdAt lossValues logitContributions binMin binMax binContains "
    "qualifyingTokenIndex zIndices zValues",
}
# The columns of Neuronpedia's tables for which its dashboards' writer has no class
# (github.com/hijohnnylin/neuronpedia, apps/webapp/prisma/schema.prisma, ebb8426).
NEURONPEDIA = {
    "explanations": "id modelId layer index embedding description authorId triggeredByUserId notes scoreV1 scoreV2 "
    "umap_x umap_y umap_cluster umap_log_feature_sparsity typeName explanationModelName createdAt updatedAt",
    "explanation_scores": "id initiatedByUserId value explanationId explanationScoreTypeName explanationScoreModelName "
    "jsonDetails createdAt",
}
# What has no default in that schema, so that a row without it is refused.
REQUIRED = {
    "release": {"name", "description", "creatorName", "creatorId"},
    "model": {"id", "creatorId", "layers", "neuronsPerLayer", "owner"},
    "sourceset": {"modelId", "name", "description", "creatorName", "creatorId"},
    "source": {"id", "modelId", "setName", "creatorId"},
    "features": {"modelId", "layer", "index"},
    # the identifiers are made by its client, not by its database
    "activations": {"id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue"}
    | {"values", "creatorId"},
    "explanations": {"id", "modelId", "layer", "index", "description", "authorId"},
    "explanation_scores": {"id", "initiatedByUserId", "value", "explanationId", "explanationScoreTypeName"}
    | {"explanationScoreModelName"},
}
KNOWN = {name: set(fields.split()) for name, fields in (SAE_DASHBOARD | NEURONPEDIA).items()}


@pytest.fixture(scope="module")
def exported(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    judged = verdicts(store)
    run = Run(explanations=explanations(), scores=scores(judged), verdicts=judged, judge="the judge")
    tokens = {0: [(" red", 4.5), ("", -1.5)], 1: [(f"x{HALF}", 2.0)]}
    output = tmp_path_factory.mktemp("np") / "export"
    return export_neuronpedia(store, output, run=run, output_tokens=tokens, max_tokens=20, progress=False)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    plain = folder / f"{name}.jsonl"
    text = plain.read_text() if plain.is_file() else gzip.decompress((folder / name / "batch-0.jsonl.gz").read_bytes())
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", KNOWN)
def test_every_field_is_one_of_theirs_and_none_is_missing(exported: Path, name: str) -> None:
    found = rows(exported, name)
    assert found
    # the importer takes the columns of the first line for all
    assert {frozenset(row) for row in found} == {frozenset(found[0])}
    assert set(found[0]) <= KNOWN[name]
    assert set(found[0]) >= REQUIRED[name]
    assert all(row[key] is not None for row in found for key in REQUIRED[name])


def test_the_folder_is_where_the_importer_looks(exported: Path, store: FeatureStore) -> None:
    assert exported.parts[-2:] == ("sample", "2-multimodal")
    assert (exported.parent.parent / "manifest.json").is_file()
    assert rows(exported, "source")[0]["id"] == "2-multimodal"
    assert [row["index"] for row in rows(exported, "features")] == [str(feature) for feature in store.features]
    keys = {(row["modelId"], row["layer"]) for name in ("features", "activations", "explanations") for row in
            rows(exported, name)}  # fmt: skip
    assert keys == {("sample", "2-multimodal")}


def test_numbers_are_those_of_the_store(exported: Path, store: FeatureStore) -> None:
    for row in rows(exported, "features"):
        feature = int(row["index"])
        statistics = store.statistics_of(feature)
        assert row["frac_nonzero"] == statistics["density"]
        assert row["maxActApprox"] == statistics["max_activation"]
        assert sum(row["freq_hist_data_bar_heights"]) == store.histogram(feature).sum()
        assert len(row["freq_hist_data_bar_heights"]) == len(row["freq_hist_data_bar_values"])
        assert row["freq_hist_data_bar_values"] == sorted(row["freq_hist_data_bar_values"])
        edges = store.histogram_edges
        for value, height in zip(row["freq_hist_data_bar_values"], row["freq_hist_data_bar_heights"], strict=True):
            place = int(np.searchsorted(edges, value)) - 1
            assert store.histogram(feature)[place] == height
    first = rows(exported, "features")[0]
    assert (first["pos_str"], first["pos_values"]) == ([" red"], [4.5])
    assert (first["neg_str"], first["neg_values"]) == ([""], [-1.5])


def test_activations_are_the_examples_with_a_picture_as_one_token(exported: Path, store: FeatureStore) -> None:
    found = rows(exported, "activations")
    assert len({row["id"] for row in found}) == len(found)
    mine = [row for row in found if row["index"] == "0"]
    examples = [
        one
        for kind in ("top", "ordinary")
        for modality in ("image", "text")
        for one in store.examples(0, kind, modality)
    ]
    assert [int(row["dataIndex"]) for row in mine] == [one.prompt_id for one in examples]
    for row, example in zip(mine, examples, strict=True):
        assert len(row["tokens"]) == len(row["values"]) <= 20
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
        pictures = [token for token in row["tokens"] if re.fullmatch(r"<image [0-9a-f]{8}>", token)]
        assert pictures == [f"<image {example.image_ids[0][:8]}>"]
        assert row["values"][row["tokens"].index(pictures[0])] == pytest.approx(example.max_image, abs=1e-5)
        assert max(
            value for token, value in zip(row["tokens"], row["values"], strict=True) if token not in pictures
        ) == pytest.approx(example.max_text, abs=1e-5)
    same = [tuple(row["tokens"]) for row in mine]
    kinds = {(row["binMin"], row["binContains"]) for row in mine if row["dataSource"].startswith("strongest")}
    assert kinds == {(-1.0, -1.0)}
    assert len(set(same)) == len({row["dataIndex"] for row in mine}), "else Neuronpedia would hide one of two prompts"


def test_drawn_examples_stand_in_their_bin_of_the_histogram(exported: Path, store: FeatureStore) -> None:
    drawn = [row for row in rows(exported, "activations") if row["dataSource"] == "drawn, image"]
    assert drawn
    for row in drawn:
        assert row["binMin"] <= row["maxValue"] <= row["binMax"]
        counts, edges = store.histogram(int(row["index"])), store.histogram_edges
        inside = counts[(edges[:-1] >= row["binMin"] - 1e-4) & (edges[1:] <= row["binMax"] + 1e-4)]
        assert row["binContains"] == pytest.approx(inside.sum() / counts.sum())


def test_explanations_have_their_judge_and_scores(exported: Path) -> None:
    found = {row["id"]: row for row in rows(exported, "explanations")}
    texts = [(row["index"], row["description"]) for row in found.values()]
    assert texts[:2] == [("0", "Objects that are red, of any shape."), ("0", "The word red in a caption.")]
    assert ("1", "") not in texts, "no row without words"
    first = next(iter(found.values()))
    assert first["notes"].startswith(
        "From regions of pictures, general, by A; detection 1.00 (another explanation .50)"
    )
    assert (first["typeName"], first["explanationModelName"]) == (None, None)
    scored = rows(exported, "explanation_scores")
    assert {found[row["explanationId"]]["description"] for row in scored} <= {text for _, text in texts}
    assert {row["explanationScoreTypeName"] for row in scored} == {"detection", "fuzzing"}
    assert {row["explanationScoreModelName"] for row in scored} == {"the judge"}
    assert json.loads(scored[0]["jsonDetails"])["control_balanced_accuracy"] == 0.5


def test_uploads_are_within_what_the_interface_takes(exported: Path) -> None:
    """The limits of `uploadBatchSchema` (apps/webapp/app/api/feature/upload-batch/route.tsx, ebb8426)."""
    body = json.loads((exported / "upload" / "batch-0.json").read_text())
    assert set(body) == {"modelId", "source", "features"}
    assert body["modelId"] == body["modelId"].lower() and body["source"] == body["source"].lower()
    assert 1 <= len(body["features"]) <= 128
    for feature in body["features"]:
        assert set(feature) == {"index", "density", "topLogits", "bottomLogits", "explanations", "activations"}
        assert isinstance(feature["index"], int) and 0 <= feature["density"] <= 1
        for logit in (*feature["topLogits"], *feature["bottomLogits"]):
            assert set(logit) == {"token", "value"} and logit["token"]
        for one in feature["explanations"]:
            assert set(one) == {"text", "methodName", "modelName"} and 1 <= len(one["text"]) <= 512
        assert feature["activations"]
        for one in feature["activations"]:
            assert set(one) == {"tokens", "values", "quantileMin", "quantileMax", "quantileFraction"}
            assert 1 <= len(one["tokens"]) == len(one["values"]) <= 1024 and all(one["tokens"])
            assert one["quantileFraction"] is None or 0 <= one["quantileFraction"] <= 1


def test_nothing_that_a_database_refuses(exported: Path) -> None:
    text = json.dumps(rows(exported, "features"))
    assert "\\ud83d" not in text and "x?" in text
    assert EVIL_END not in text


def test_long_prompts_are_cut_around_the_strongest_token(store: FeatureStore) -> None:
    (example,) = store.examples(TEXT_FEATURE, "top", "text")
    tokens, values = spelt_tokens(example, 3)
    assert len(tokens) == 3 and max(values) == example.max_text
    whole, _ = spelt_tokens(example, 1000)
    assert len(whole) == len(example.tokens)


def test_names_are_checked_and_folders_left_alone(store: FeatureStore, tmp_path: Path) -> None:
    for names in (NeuronpediaNames(model_id="A b"), NeuronpediaNames(source_set="x/y")):
        with pytest.raises(ConfigError, match="Neuronpedia takes small letters"):
            export_neuronpedia(store, tmp_path / "x", names=names, progress=False)
    with pytest.raises(ConfigError, match="max_tokens=2000"):
        export_neuronpedia(store, tmp_path / "x", max_tokens=2000, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds no export"):
        export_neuronpedia(store, tmp_path / "mine", progress=False)
    names = NeuronpediaNames(model_id="gemma-3", source_set="res-16k", layer=7, explanation_type="np_max-act")
    first = export_neuronpedia(store, tmp_path / "out", features=[0], names=names, progress=False)
    again = export_neuronpedia(store, tmp_path / "out", features=[0], names=names, progress=False)
    assert first == again == tmp_path / "out" / "gemma-3" / "7-res-16k"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_the_same_export_twice_is_the_same(store: FeatureStore, tmp_path: Path) -> None:
    one, other = (export_neuronpedia(store, tmp_path / name, features=[0, 1], progress=False) for name in "ab")
    for path in (path for path in one.rglob("*") if path.is_file()):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes()
