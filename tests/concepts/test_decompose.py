"""Decompositions: planted concepts come back, nothing gets worse, and scikit-learn's own answers are met."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import DictionaryLearning
from sklearn.exceptions import ConvergenceWarning

from sae_lens_multimodal.concepts.decompose import METHODS, decompose, kmeans, largest_rows, pca, sae_features
from sae_lens_multimodal.concepts.dictionary import find_concepts
from sae_lens_multimodal.concepts.semi_nmf import objective, semi_nmf, spread_rows
from sae_lens_multimodal.concepts.states import ConceptStates
from sae_lens_multimodal.errors import ConfigError, SAEMismatchError
from sae_lens_multimodal.hooks.concept_sae import optimal_codes
from tests.concepts.concept_samples import planted
from tests.hooks.hook_samples import build_sae


def matched_cosines(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    cosines = (found / found.norm(dim=1, keepdim=True)) @ (truth / truth.norm(dim=1, keepdim=True)).T
    return cosines[linear_sum_assignment(-cosines.numpy())]


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_dictionary_is_recovered(seed: int) -> None:
    states, concepts, activations = planted(seed)
    found = find_concepts(states, 8, seed=seed)
    assert matched_cosines(found.concepts, concepts).min() > 0.95
    assert found.encode(states).sub(found.activations).abs().max() < 1e-2
    cosines = found.concepts @ concepts.T
    partner = linear_sum_assignment(-cosines.numpy())[1]
    for concept, own in enumerate(partner):
        pair = torch.stack([found.activations[:, concept], activations[:, own]])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.95


@pytest.mark.parametrize("length", [0.0, 2.0, 20.0])
def test_a_common_mean_is_kept_apart(length: float, caplog: pytest.LogCaptureFixture) -> None:
    varying, concepts, _ = planted(2, n=500, d=256, k=8)
    mean = torch.randn(256, generator=torch.Generator().manual_seed(9))
    states = varying + length * mean / mean.norm()
    found = find_concepts(states, 8, offset=True)
    assert found.bias is not None
    assert matched_cosines(found.concepts, concepts).min() > 0.95
    rest = states - found.decode(found.encode(states))
    assert float(rest.square().sum() / (states - states.mean(0)).square().sum()) < 0.02
    history = torch.tensor(found.objective)
    assert (history[1:] <= history[:-1] * (1 + 1e-5) + 1e-4).all()
    assert not caplog.text
    without = find_concepts(states, 8)
    assert ("offset=True" in caplog.text) == (length > 10)
    if length > 10:
        assert matched_cosines(without.concepts, concepts).min() < 0.8


def test_without_an_offset_the_objective_itself_prefers_other_concepts() -> None:
    """So neither more starts nor a better beginning help: begun at the truth, scikit-learn leaves it for less."""
    varying, concepts, _ = planted(0, n=500, d=256, k=8)
    mean = torch.randn(256, generator=torch.Generator().manual_seed(99))
    mean /= mean.norm()
    states = varying + 10 * mean
    alpha = 0.02 * float(states.norm(dim=1).mean())
    truth = torch.cat([concepts, mean[None]])
    codes = optimal_codes(states.double() @ truth.double().T, truth.double() @ truth.double().T, l1=alpha).float()
    at_truth = objective(states, truth, codes, alpha)
    ends = [semi_nmf(states, 9, alpha=alpha, seed=seed) for seed in range(3)]
    values = [one.objective[-1] for one in ends]
    assert max(values) < 0.9 * at_truth
    assert max(values) - min(values) < 0.001 * at_truth
    theirs = DictionaryLearning(
        9, alpha=alpha, positive_code=True, fit_algorithm="cd", transform_algorithm="lasso_cd", transform_alpha=alpha,
        max_iter=100, dict_init=truth.double().numpy(), code_init=codes.double().numpy(), random_state=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        their_codes = torch.from_numpy(theirs.fit_transform(states.double().numpy())).float()
    their_concepts = torch.from_numpy(theirs.components_).float()
    assert objective(states, their_concepts, their_codes, alpha) < 0.9 * at_truth
    for found in (*(one.concepts for one in ends), their_concepts):
        assert matched_cosines(found, concepts).min() < 0.9


def test_recovery_needs_what_was_planted() -> None:
    states, _, _ = planted(0)
    other = planted(77)[1]
    assert matched_cosines(find_concepts(states, 8).concepts, other).max() < 0.9


def test_dense_random_states_are_not_explained() -> None:
    noise = torch.randn(300, 48, generator=torch.Generator().manual_seed(0))
    assert matched_cosines(find_concepts(noise, 8).concepts, planted(0)[1]).min() < 0.9


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, 6), alpha=st.floats(0, 1))
def test_rounds_never_make_it_worse_and_constraints_hold(seed: int, k: int, alpha: float) -> None:
    states = torch.randn(24, 7, generator=torch.Generator().manual_seed(seed)) * 3
    found = semi_nmf(states, k, alpha=alpha, seed=seed, max_rounds=20)
    history = torch.tensor(found.objective)
    assert (history[1:] <= history[:-1] * (1 + 1e-5) + 1e-4).all()
    assert (found.activations >= 0).all()
    assert (found.concepts.norm(dim=1) <= 1 + 1e-5).all()
    exact = objective(states, found.concepts, found.activations, alpha)
    assert found.objective[-1] == pytest.approx(exact, rel=1e-4, abs=1e-2)


def test_the_objective_is_at_least_as_good_as_scikit_learns() -> None:
    states, _, _ = planted(3, n=200, noise=0.3)
    ours = semi_nmf(states, 8, alpha=0.5, n_starts=2)
    theirs = DictionaryLearning(
        8, alpha=0.5, positive_code=True, fit_algorithm="cd", transform_algorithm="lasso_cd", random_state=0
    )
    codes = torch.from_numpy(theirs.fit_transform(states.double().numpy())).float()
    concepts = torch.from_numpy(theirs.components_).float()
    # What it gives, or the best activations for what it gives, whichever is better.
    assert ours.objective[-1] <= 1.005 * objective(states, concepts, codes, 0.5)


def test_seeds_decide() -> None:
    states, _, _ = planted(4, n=120)
    for method in METHODS:
        if method in ("sae", "dictionary_learning"):
            continue
        one, again = (find_concepts(states, 5, method, seed=3) for _ in range(2))  # type: ignore[arg-type]
        assert torch.equal(one.concepts, again.concepts), method
    rows = [spread_rows(states, 5, seed) for seed in (0, 1)]
    assert not torch.equal(*rows)
    assert not torch.equal(*(find_concepts(states, 5, "random", seed=seed).concepts for seed in (0, 1)))


def test_principal_components_rebuild_as_much_as_their_eigenvalues_say() -> None:
    states, _, _ = planted(5, n=100)
    found = pca(states, 4)
    assert found.bias is not None
    assert found.concepts.shape == (8, 48)
    rest = states - found.bias - found.activations @ found.concepts
    eigenvalues = torch.linalg.eigvalsh(torch.cov(states.T.double(), correction=0)).flip(0)
    assert float(rest.double().square().sum() / len(states)) == pytest.approx(float(eigenvalues[4:].sum()), rel=1e-3)


def test_kmeans_finds_clusters_and_a_state_has_one() -> None:
    centres = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    states = centres.repeat(20, 1) + 0.1 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    found = kmeans(states, 3)
    assert matched_cosines(found.concepts, centres).min() > 0.99
    assert ((found.activations > 0).sum(1) == 1).all()


def test_the_simple_baseline_takes_the_longest_states() -> None:
    states = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 0.0]])
    found = largest_rows(states, 2)
    assert found.concepts.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert torch.allclose(found.activations, torch.tensor([[0.0, 1.0], [5.0, 0.0], [0.0, 3.0]]), atol=1e-5)


def test_an_saes_own_features_are_those_that_write_most() -> None:
    sae = build_sae("standard")
    states = torch.randn(50, 48, generator=torch.Generator().manual_seed(0))
    found = sae_features(states, 6, sae)
    codes = sae.encode(states)
    written = (codes.sum(0) * sae.W_dec.norm(dim=1)).detach()
    assert sorted(found.features) == sorted(written.topk(6).indices.tolist())
    assert torch.allclose(found.activations, codes[:, list(found.features)], atol=1e-5)
    assert torch.equal(found.concepts, sae.W_dec[list(found.features)])
    with pytest.raises(SAEMismatchError, match="d_in=48"):
        sae_features(states[:, :40], 6, sae)
    with pytest.raises(SAEMismatchError, match="layer_norm"):
        sae_features(states, 6, build_sae("standard", normalize_activations="layer_norm"))


@pytest.mark.parametrize(("field", "value"), [("hook_name", "blocks.0.hook_resid_post"), ("model_name", "another")])
def test_an_sae_of_elsewhere_is_refused(states: ConceptStates, field: str, value: str) -> None:
    own = {"hook_name": states.hook_name, "model_name": states.model_name}
    width = states.states.shape[1]
    assert find_concepts(states, 2, "sae", sae=build_sae("standard", d_in=width, metadata=own)).k == 2
    with pytest.raises(SAEMismatchError, match=value):
        find_concepts(states, 2, "sae", sae=build_sae("standard", d_in=width, metadata={**own, field: value}))


def test_mistakes_are_told() -> None:
    states = torch.randn(5, 3)
    with pytest.raises(ConfigError, match="k=9 for 5 states"):
        find_concepts(states, 9)
    with pytest.raises(ConfigError, match="method='nmf'"):
        decompose(states, 2, "nmf")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give sae="):
        find_concepts(states, 2, "sae")
    with pytest.raises(ConfigError, match="sparsity=-1"):
        find_concepts(states, 2, sparsity=-1)
    with pytest.raises(ConfigError, match="no states"):
        find_concepts(states[:0], 2)
    with pytest.raises(ConfigError, match="1 of 5 states hold NaN"):
        find_concepts(states.clone().index_fill_(0, torch.tensor([2]), torch.nan), 2)
    with pytest.raises(ConfigError, match="only semi_nmf finds an offset"):
        find_concepts(states, 2, "kmeans", offset=True)
    with pytest.raises(ConfigError, match="expected 1 to 3"):
        find_concepts(states, 4, "pca")
