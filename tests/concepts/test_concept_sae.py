"""The architecture of concept dictionaries solves its problem, has the right gradient, and is SAE-Lens's to load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from scipy.optimize import nnls
from sklearn.linear_model import Lasso

from sae_lens_multimodal.hooks.concept_sae import (
    ConceptDictionarySAE,
    ConceptDictionarySAEConfig,
    nonnegative_codes,
    optimal_codes,
)
from tests.concepts.concept_samples import planted


def build(concepts: torch.Tensor, **config: object) -> ConceptDictionarySAE:
    k, d = concepts.shape
    sae = ConceptDictionarySAE(ConceptDictionarySAEConfig(d_in=d, d_sae=k, **config))  # type: ignore[arg-type]
    sae.load_state_dict({"W_dec": concepts, "b_dec": torch.zeros(d)})
    return sae


def test_without_a_weight_codes_are_those_of_scipys_nnls() -> None:
    states, concepts, _ = planted(0, n=20, noise=0.5)
    codes = build(concepts).encode(states)
    for state, code in zip(states, codes, strict=True):
        expected, _ = nnls(concepts.T.numpy().astype(float), state.numpy().astype(float))
        assert torch.allclose(code, torch.from_numpy(expected).float(), atol=1e-3)
    assert (codes == 0).any()


def test_with_a_weight_codes_are_those_of_scikit_learns_lasso() -> None:
    states, concepts, _ = planted(1, n=6, noise=0.3)
    codes = build(concepts, l1=0.4).encode(states)
    for state, code in zip(states, codes, strict=True):
        # scikit-learn divides the squares by the number of observations, which are the dimensions here.
        lasso = Lasso(alpha=0.4 / len(state), positive=True, fit_intercept=False, tol=1e-9, max_iter=10_000)
        expected = lasso.fit(concepts.T.double().numpy(), state.double().numpy()).coef_
        assert torch.allclose(code, torch.from_numpy(expected).float(), atol=1e-3)


def test_a_better_start_changes_nothing_at_the_end() -> None:
    states, concepts, activations = planted(2, n=10)
    scores, gram = states @ concepts.T, concepts @ concepts.T
    cold = nonnegative_codes(scores, gram, l1=0.1)
    assert torch.allclose(nonnegative_codes(scores, gram, l1=0.1, start=activations), cold, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_more_concepts_than_dimensions_are_solved_to_the_end(seed: int) -> None:
    """Coordinate descent alone stops well short of what scipy finds."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(6, generator=generator)
    concepts = torch.nn.functional.normalize(shared + 0.3 * torch.randn(30, 6, generator=generator), dim=1)
    states = torch.randn(20, 6, generator=generator) + 3 * shared
    codes = build(concepts).encode(states).double()
    own = (states.double() - codes @ concepts.double()).norm(dim=1)
    best = torch.tensor(
        [nnls(concepts.T.double().numpy(), one.double().numpy(), maxiter=2000)[1] for one in states]
    ).double()
    assert torch.allclose(own, best, atol=1e-4)
    scores, gram = (states @ concepts.T).double(), (concepts @ concepts.T).double()
    short = nonnegative_codes(scores, gram)
    left = (states.double() - short @ concepts.double()).norm(dim=1)
    assert float((left - best).max()) > 1e-3


@pytest.mark.parametrize("l1", [0.0, 0.5])
def test_the_conditions_of_the_optimum_hold_above_the_rank(l1: float) -> None:
    generator = torch.Generator().manual_seed(3)
    concepts = torch.nn.functional.normalize(2 + torch.randn(25, 5, generator=generator), dim=1).double()
    states = torch.randn(12, 5, generator=generator).double() + 4
    codes = optimal_codes(states @ concepts.T, concepts @ concepts.T, l1=l1)
    slopes = (codes @ concepts - states) @ concepts.T + l1
    assert (codes >= 0).all()
    assert float((-slopes).max()) < 1e-6
    assert float((slopes * codes).abs().max()) < 1e-6
    one_by_one = [optimal_codes(s[None] @ concepts.T, concepts @ concepts.T, l1=l1) @ concepts for s in states]
    assert torch.allclose(torch.cat(one_by_one), codes @ concepts, atol=1e-6)


@pytest.mark.parametrize("l1", [0.0, 0.3])
def test_the_gradient_is_that_of_finite_differences(l1: float) -> None:
    states, concepts, _ = planted(3, n=4, noise=0.5)
    sae = build(concepts.double(), l1=l1, dtype="float64", n_sweeps=400).to(dtype=torch.float64)
    x = states.double().requires_grad_()
    weights = torch.randn(4, len(concepts), generator=torch.Generator().manual_seed(0)).double()
    (gradient,) = torch.autograd.grad((sae.encode(x) * weights).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        ahead, behind = (((sae.encode(x + step * direction)) * weights).sum() for step in (1e-5, -1e-5))
    assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-3)


def test_nearest_is_one_hot_and_right() -> None:
    centres = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
    codes = build(centres, encoder="nearest").encode(torch.tensor([[3.0, 1.0], [0.5, 3.0], [-9.0, -1.0]]))
    assert codes.tolist() == [[0.75, 0.0], [0.0, 1.5], [0.0, 0.0]]


def test_saved_and_loaded_by_sae_lens(tmp_path: Path) -> None:
    states, concepts, _ = planted(4, n=5)
    sae = build(concepts, l1=0.2)
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert torch.equal(loaded.encode(states), sae.encode(states))
    assert torch.equal(loaded(states), sae(states))
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()


def test_a_hook_of_sae_lens_sees_the_codes() -> None:
    states, concepts, _ = planted(5, n=3)
    sae = build(concepts)
    _, cache = sae.run_with_cache(states)
    assert torch.equal(cache["hook_sae_acts_post"], sae.encode(states))


def test_folding_is_refused() -> None:
    sae = build(torch.eye(3))
    with pytest.raises(NotImplementedError, match="cannot be folded"):
        sae.fold_W_dec_norm()
    with pytest.raises(NotImplementedError, match="cannot be folded"):
        sae.fold_activation_norm_scaling_factor(2.0)
