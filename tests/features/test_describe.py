"""Descriptions of features against naive sums over pairs, on the activations of a forward pass of their own."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sklearn.metrics.pairwise import cosine_similarity

import sae_lens_multimodal.features.evidence as evidence_module
import sae_lens_multimodal.features.schema as schema_module
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, FeatureError, SAEMismatchError, StoreError
from sae_lens_multimodal.features.cofiring import PairCounts
from sae_lens_multimodal.features.describe import DescriptionSettings, describe_features
from sae_lens_multimodal.features.embedding import tower_embedding
from sae_lens_multimodal.features.example import Example
from sae_lens_multimodal.features.harvest import harvest
from sae_lens_multimodal.features.neighbours import nearest_directions
from sae_lens_multimodal.features.relations import Pair, relation
from sae_lens_multimodal.features.sampled import with_pictures
from sae_lens_multimodal.features.schema import DESCRIBED
from sae_lens_multimodal.features.similarity import cross_modal_weights, monosemanticity
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.hooks.effects import top_output_tokens
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.types import Modality

Rows = list[dict[str, Any]]
RARE = -1.0
SETTINGS = DescriptionSettings(n_examples=3, n_cofiring=5, n_neighbours=4, n_writes=3)
FEATURES = 30
LABELS = {"image": Modality.IMAGE.value, "text": Modality.TEXT.value}


@pytest.fixture(scope="module")
def plain(
    model: VisionLanguageModel, sae: SAE[Any], rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    folder = tmp_path_factory.mktemp("described") / "store"
    return harvest(model, sae, rows, folder, n_top=4, n_ordinary=4, n_silent=2, batch_size=4, progress=False)


@pytest.fixture(scope="module")
def store(model: VisionLanguageModel, sae: SAE[Any], plain: FeatureStore) -> FeatureStore:
    copy = plain.folder.parent / "copy"
    shutil.copytree(plain.folder, copy)
    chosen = plain.features[:FEATURES]
    return describe_features(model, sae, copy, features=chosen, settings=SETTINGS, batch_size=4, progress=False)


@pytest.fixture(scope="module")
def hidden(model: VisionLanguageModel, sae: SAE[Any], plain: FeatureStore) -> dict[int, torch.Tensor]:
    """Of each stored prompt what the hook holds, without padding."""
    found = {}
    for prompt_id in plain.prompt_ids:
        batch = model.encode(with_pictures(plain.prompt(prompt_id)))
        hook = str(sae.cfg.metadata.hook_name)
        found[prompt_id] = read_activations(model, batch, hook)[hook][0]
    return found


def sampled(store: FeatureStore, feature: int, modality: str, kinds: tuple[str, ...]) -> list[Example]:
    return [one for kind in kinds for one in store.examples(feature, kind, modality)[:3]]  # type: ignore[arg-type]


def strongest(example: Example) -> int:
    inside = np.where(example.prompt.modality == LABELS[example.modality], example.activations, 0)
    return int(inside.argmax())


def middling(example: Example) -> int:
    inside = np.where(example.prompt.modality == LABELS[example.modality], example.activations, 0)
    firing = np.flatnonzero(inside)
    return int(firing[np.argsort(inside[firing], kind="stable")[len(firing) // 2]])


def test_monosemanticity_is_the_mean_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    e = rng.normal(size=(9, 5))
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    a = rng.random(9)
    pairs = list(itertools.combinations(range(9), 2))
    naive = sum(a[n] * a[m] * (e[n] @ e[m]) for n, m in pairs) / sum(a[n] * a[m] for n, m in pairs)
    found = monosemanticity((a[:, None] * e).sum(0), a.sum(), (a**2).sum())
    assert float(found) == pytest.approx(naive)
    one = monosemanticity(0.7 * e[:1].sum(0), np.asarray(0.7), np.asarray(0.49))
    assert np.isnan(one)


def test_cross_modal_weight_is_the_mean_over_all_pairs_of_tokens() -> None:
    rng = np.random.default_rng(1)
    tokens = [[rng.normal(size=(count, 6)) for count in counts] for counts in ((2, 3), (4, 1), (2, 0), (3, 3))]
    unit = [[part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts] for parts in tokens]
    image, text = (np.stack([parts[side].sum(0) for parts in unit]) for side in (0, 1))
    counts = np.array([[len(part) for part in parts] for parts in unit])
    own, floor = cross_modal_weights(image, text, counts[:, 0], counts[:, 1])
    assert np.isnan(own[2]) and np.isnan(floor[2])
    both = (0, 1, 3)
    for one in both:
        assert own[one] == pytest.approx((unit[one][0] @ unit[one][1].T).mean())
        others = [other for other in both if other != one]
        across = [(unit[one][0] @ unit[o][1].T).mean() + (unit[one][1] @ unit[o][0].T).mean() for o in others]
        assert floor[one] == pytest.approx(np.mean(across) / 2)


def test_crops_are_compared_as_a_sum_over_pairs_does(model: VisionLanguageModel, store: FeatureStore) -> None:
    embed, checked, all_units = tower_embedding(model), 0, []
    for feature in store.features[:FEATURES]:
        examples = sampled(store, feature, "image", ("top", "ordinary"))
        crops, weights = [], []
        for example in examples:
            picture = int(example.layout.image_index[0, strongest(example)])
            inside = example.image_values * (example.layout.image_index[0].numpy() == picture)
            lit = np.flatnonzero(inside >= max(inside.max() / 2, 1e-9))
            crops.append(example.layout.crop(example.images[picture], lit, min_size=28))
            weights.append(example.max_image / store.statistics_of(feature)["max_image"])
        found = store.description(feature)
        assert found is not None
        assert found.n_crops == len(crops)
        if not crops:
            continue
        vectors = embed(crops)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        all_units.append(unit)
        pairs = list(itertools.combinations(range(len(crops)), 2))
        if pairs:
            mass = sum(weights[n] * weights[m] for n, m in pairs)
            naive = sum(weights[n] * weights[m] * (unit[n] @ unit[m]) for n, m in pairs) / mass
            assert found.monosemanticity == pytest.approx(naive, abs=1e-4)
            assert found.monosemanticity <= 1 + 1e-6
            checked += 1
        else:
            assert found.monosemanticity is None
    assert checked > 20
    whole = np.concatenate(all_units)
    similar = cosine_similarity(whole)
    expected = (similar.sum() - len(whole)) / (len(whole) * (len(whole) - 1))
    assert store.descriptions is not None
    assert store.descriptions.settings["random_crops"] == pytest.approx(expected, abs=1e-4)


def test_cross_modal_weights_are_those_of_the_top_tokens(store: FeatureStore, hidden: dict[int, torch.Tensor]) -> None:
    checked = 0
    for feature in store.features[:FEATURES]:
        vectors = [
            [hidden[one.prompt_id][strongest(one)].numpy() for one in sampled(store, feature, name, ("top",))]
            for name in LABELS
        ]
        found = store.description(feature)
        assert found is not None
        if all(vectors):
            assert found.cross_modal == pytest.approx(cosine_similarity(*map(np.stack, vectors)).mean(), abs=1e-4)
            assert found.cross_modal_lift == pytest.approx(found.cross_modal - found.cross_modal_floor)  # type: ignore[operator]
            checked += 1
        else:
            assert found.cross_modal is None and found.cross_modal_lift is None
    assert checked > 5


def test_cofiring_features_are_those_that_fire_on_the_same_tokens(
    sae: SAE[Any], store: FeatureStore, hidden: dict[int, torch.Tensor]
) -> None:
    checked = 0
    for feature in store.features[:FEATURES]:
        examples = [one for name in LABELS for one in sampled(store, feature, name, ("top", "ordinary"))]
        with torch.no_grad():
            tokens = [strongest(one) if one.kind == "top" else middling(one) for one in examples]
            states = [hidden[one.prompt_id][token] for one, token in zip(examples, tokens, strict=True)]
            fires = (sae.encode(torch.stack(states)) > 0).numpy()
        share = fires.mean(axis=0)
        found = store.description(feature)
        assert found is not None
        assert found.n_tokens == len(examples)
        # one token in a thousand may fall on the other side of the k-th place in a batch of another shape
        assert all(abs(one.share - share[one.feature]) <= 1 / len(examples) + 1e-6 for one in found.cofiring)
        for one in found.cofiring:
            density = store.statistics_of(one.feature)["density"]
            assert one.lift == pytest.approx(one.share / density, rel=1e-4)
            assert one.feature != feature and one.lift > 1
            checked += 1
    assert checked > 50


def test_neighbours_are_those_of_scikit_learn(sae: SAE[Any], store: FeatureStore) -> None:
    cosines = cosine_similarity(sae.W_dec.detach().numpy())
    np.fill_diagonal(cosines, -2)
    for feature in store.features[:FEATURES]:
        found = store.description(feature)
        assert found is not None
        assert [one.feature for one in found.neighbours] == np.argsort(-cosines[feature])[:4].tolist()
        assert [one.cosine for one in found.neighbours] == pytest.approx(np.sort(cosines[feature])[::-1][:4], abs=1e-5)


def test_blocks_do_not_change_neighbours(sae: SAE[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nearest_directions(sae, [3, 90, 4], count=5)
    monkeypatch.setattr("sae_lens_multimodal.features.neighbours._BLOCK_ELEMENTS", 1)
    assert torch.equal(nearest_directions(sae, [3, 90, 4], count=5).features, whole.features)
    assert nearest_directions(sae, [], count=5).features.shape == (0, 5)


def test_output_tokens_are_those_of_the_model(model: VisionLanguageModel, sae: SAE[Any], store: FeatureStore) -> None:
    feature = store.features[0]
    found = store.description(feature)
    assert found is not None
    (expected,) = top_output_tokens(model, sae, [feature], 3)
    assert [token for token, _ in found.writes] == [token for token, _ in expected]
    assert [logit for _, logit in found.writes] == pytest.approx([logit for _, logit in expected], abs=1e-4)


def test_planted_relations_are_found(model: VisionLanguageModel, rows: Rows, tmp_path: Path) -> None:
    """A dictionary in which one feature is another's copy, and one fires on the stronger half of its tokens only."""
    config = StandardSAEConfig(d_in=model.d_model, d_sae=6)
    config.metadata.hook_name = "blocks.1.hook_resid_post"
    sae = StandardSAE(config)
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(model.d_model, generator=generator)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_dec):
            parameter.zero_()
        sae.b_enc.fill_(-1.0)
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=generator))
        for feature, bias in ((0, 0.0), (1, 0.0), (2, RARE)):
            sae.W_enc[:, feature], sae.b_enc[feature] = direction, bias * float(direction.norm())
            sae.W_dec[feature] = direction
        sae.W_enc[:, 3], sae.b_enc[3], sae.W_dec[3] = -direction, 0.0, direction
    store = harvest(model, sae, rows, tmp_path / "store", n_top=8, n_ordinary=8, batch_size=4, progress=False)
    described = describe_features(model, sae, store, settings=DescriptionSettings(crops=False), progress=False)
    statistics = {feature: store.statistics_of(feature) for feature in range(4)}
    assert 0 < statistics[2]["density"] < 0.6 * statistics[0]["density"]
    assert statistics[2]["n_prompts"] >= 8
    relations = {
        feature: {one.feature: one.relation for one in (described.description(feature) or pytest.fail()).neighbours}
        for feature in (0, 1, 2, 3)
    }
    assert relations[0][1] == relations[1][0] == "same"
    assert relations[2][0] == "general case"
    assert relations[0][3] in ("split", "absorbs this", "absorbed by this", "other modality"), (
        "they never fire together"
    )
    assert relations[0][4] == relations[0][5] == "", "directions that are not near"


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (Pair(0.9, 0.9, 0.9, 1.0, 0.0, 8), "same"),
        (Pair(0.9, 0.2, 0.9, 0.2, 0.0, 8), "special case"),
        (Pair(0.9, 0.9, 0.2, 5.0, 0.0, 8), "general case"),
        (Pair(0.9, 0.0, 0.1, 1.0, 0.1, 8), "split"),
        (Pair(0.9, 0.0, 0.1, 0.2, 0.1, 8), "absorbs this"),
        (Pair(0.9, 0.0, 0.1, 4.0, 0.1, 8), "absorbed by this"),
        (Pair(0.9, 0.0, 0.1, 0.2, 0.9, 8), "other modality"),
        (Pair(0.9, 0.5, 0.5, 1.0, 0.0, 8), ""),
        (Pair(0.9, 0.9, 0.9, 1.0, 0.0, 3), ""),
        (Pair(0.9, float("nan"), 0.9, 1.0, 0.0, 8), "special case"),
        (Pair(0.3, 0.9, 0.9, 1.0, 0.0, 8), ""),
    ],
)
def test_relations_by_hand(pair: Pair, expected: str) -> None:
    assert relation(pair) == expected


def test_pairs_are_counted_however_often_they_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    rows, features = rng.integers(0, 4, 300), rng.integers(0, 9, 300)
    for merge_at in (1, 7, 10_000):
        monkeypatch.setattr("sae_lens_multimodal.features.cofiring._MERGE_AT", merge_at)
        pairs = PairCounts(9)
        for start in range(0, 300, 5):
            pairs.add(rows[start : start + 5], features[start : start + 5])
        pairs.merge()
        for row in range(4):
            expected = np.bincount(features[rows == row], minlength=9)
            assert [pairs.count(row, feature) for feature in range(9)] == expected.tolist()
            assert pairs.of(row).features.tolist() == np.flatnonzero(expected).tolist()
    assert pairs.count(4, 0) == 0


class Killed(Exception):
    """Stands for whatever ends a process."""


def test_killed_and_resumed_it_is_the_same(
    model: VisionLanguageModel,
    sae: SAE[Any],
    plain: FeatureStore,
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(plain.folder, tmp_path / "store")
    chosen = plain.features[:FEATURES]
    settings: dict[str, Any] = {"features": chosen, "settings": SETTINGS, "batch_size": 4, "progress": False}
    settings["checkpoint_batches"] = 1
    reads: list[int] = []

    def killing(*args: Any, **kwargs: Any) -> Any:
        reads.append(1)
        if len(reads) % 3 == 0:
            raise Killed
        return read_activations(*args, **kwargs)

    monkeypatch.setattr(evidence_module, "read_activations", killing)
    kills = 0
    while kills < 10:
        try:
            found = describe_features(model, sae, tmp_path / "store", **settings)
            break
        except Killed:
            kills += 1
            assert FeatureStore.open(tmp_path / "store").descriptions is None
    assert kills > 0
    mine, whole = (pq.read_table(one.paths.described / "features.parquet") for one in (found, store))
    assert repr(mine.to_pylist()) == repr(whole.to_pylist())
    assert not (found.paths.described / "progress").exists()
    count = len(reads)
    describe_features(model, sae, found, **settings)
    assert len(reads) == count, "what is described is not described again"


def test_what_does_not_fit_is_refused(
    model: VisionLanguageModel, sae: SAE[Any], plain: FeatureStore, store: FeatureStore
) -> None:
    assert plain.description(3) is None
    with pytest.raises(StoreError, match="descriptions with another n_examples"):
        describe_features(model, sae, store, settings=DescriptionSettings(n_examples=1), progress=False)
    with pytest.raises(FeatureError, match="feature 96 is not in"):
        describe_features(model, sae, plain, features=[96], progress=False)
    with pytest.raises(ConfigError, match="n_neighbours=0"):
        describe_features(model, sae, plain, settings=DescriptionSettings(n_neighbours=0))
    other = type(sae)(sae.cfg)
    with pytest.raises(SAEMismatchError):
        describe_features(model, other, plain, progress=False)


def test_documented_schema_is_what_is_written(store: FeatureStore) -> None:
    document = (Path(schema_module.__file__).parent / "SCHEMA.md").read_text(encoding="utf-8")
    section = document.split("## `described/features.parquet`")[1].split("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, flags=re.MULTILINE)
    written = pq.read_schema(store.paths.described / "features.parquet")
    assert written.equals(DESCRIBED)
    assert documented == [(field.name, re.sub("(item|element): ", "", str(field.type))) for field in written]
    manifest = json.loads((store.paths.described / "manifest.json").read_text())
    settings = document.split("## `described/manifest.json`")[1].split("\n## ")[0]
    assert set(manifest["settings"]) == set(re.findall(r"^\| `(\w+)` \|", settings, flags=re.MULTILINE))
