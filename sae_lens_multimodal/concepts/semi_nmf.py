"""Semi-NMF: states as sums of few concepts with weights of at least 0, by block coordinate descent on torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.concept_sae import nonnegative_codes, optimal_codes, precise_dtype


@dataclass(frozen=True, eq=False)
class Factors:
    """States ≈ `activations` · `concepts` (+ `bias`)."""

    concepts: Float[Tensor, "k d"]
    activations: Float[Tensor, "n k"]
    bias: Float[Tensor, " d"] | None = None
    """What is taken off the states first."""
    objective: tuple[float, ...] = ()
    """What was minimised, after each round; empty where nothing was."""


def objective(
    states: Float[Tensor, "n d"], concepts: Float[Tensor, "k d"], activations: Float[Tensor, "n k"], alpha: float
) -> float:
    """½‖Z - VU‖² + alpha ΣV.

    >>> objective(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0]]), 0.5)
    1.0
    """
    rest = (states - activations @ concepts).double()
    return float(0.5 * rest.square().sum() + alpha * activations.double().sum())


@torch.no_grad()
def semi_nmf(
    states: Float[Tensor, "n d"],
    k: int,
    *,
    alpha: float = 0.0,
    seed: int = 0,
    n_starts: int = 1,
    max_rounds: int = 300,
    tolerance: float = 1e-5,
    n_sweeps: int = 2,
    offset: bool = False,
) -> Factors:
    """Minimise ½‖Z - VU‖² + alpha ΣV with V ≥ 0 and ‖u_k‖ ≤ 1 (arXiv 2406.08074); with an offset ½‖Z - VU - b‖².

    Rounds of two halves, neither of which can make it worse: V by sweeps of coordinate descent, which need only ZUᵀ and
    UUᵀ; then each concept by its optimum in the unit ball, which needs only VᵀZ and VᵀV (as in online dictionary
    learning; Mairal et al. 2010). It begins with rows of Z drawn as k-means++ draws them.

    Args:
        states: Z.
        k: concepts.
        alpha: weight of the activations' sum, in the unit of the states.
        seed: of the rows to begin with.
        n_starts: how often to begin; the best result counts.
        max_rounds: rounds at most.
        tolerance: stop where a round gains less than this share of the objective.
        n_sweeps: sweeps a round.
        offset: find also a vector b that all states share, in turn with the concepts; without one a long common mean
            has to be made of the concepts, which then are no longer those that the states vary in.

    Raises:
        ConfigError: there are fewer states than concepts, or a number is out of range.
    """
    if not 1 <= k <= len(states):
        raise ConfigError(f"Got k={k} for {len(states)} states; expected 1 to {len(states)}.")
    if alpha < 0 or n_starts < 1 or max_rounds < 1 or n_sweeps < 1:
        raise ConfigError(
            f"Got alpha={alpha}, n_starts={n_starts}, max_rounds={max_rounds}, n_sweeps={n_sweeps}; expected at least "
            "0, 1, 1 and 1."
        )
    z = states.to(torch.promote_types(states.dtype, torch.float32))
    begin = z.new_zeros(z.shape[1])
    if offset:
        # Not their mean: of what lies about it, half would point away from the concepts.
        begin = z[(z - z.mean(0)).norm(dim=1).argmin()]
    found = [
        _from_one_start(
            z, spread_rows(z - begin, k, seed + 7919 * start), begin, alpha, max_rounds, tolerance, n_sweeps, offset
        )
        for start in range(n_starts)
    ]
    return min(found, key=lambda one: one.objective[-1])


def _from_one_start(
    states: Tensor,
    concepts: Tensor,
    bias: Tensor,
    alpha: float,
    max_rounds: int,
    tolerance: float,
    n_sweeps: int,
    offset: bool,
) -> Factors:
    z = states - bias if offset else states
    square = float(z.double().square().sum())
    scores, gram = z @ concepts.T, concepts @ concepts.T
    codes = nonnegative_codes(scores, gram, l1=alpha, n_sweeps=4 * n_sweeps)
    history: list[float] = []
    for _ in range(max_rounds):
        concepts = _updated(z, codes, concepts)
        if offset:
            bias = states.mean(0) - codes.mean(0) @ concepts
            z = states - bias
            square = float(z.double().square().sum())
        scores, gram = z @ concepts.T, concepts @ concepts.T
        codes = nonnegative_codes(scores, gram, l1=alpha, n_sweeps=n_sweeps, start=codes)
        history.append(_objective_of(square, scores, gram, codes, alpha))
        if len(history) > 1 and history[-2] - history[-1] <= tolerance * abs(history[-2]):
            break
    # What is returned are the optimal activations for the concepts that are returned.
    precise = precise_dtype(z.device)
    codes = optimal_codes(scores.to(precise), gram.to(precise), l1=alpha, start=codes).to(z.dtype)
    history.append(_objective_of(square, scores, gram, codes, alpha))
    order = (codes.sum(0) * concepts.norm(dim=1)).argsort(descending=True)
    own = bias if offset else None
    return Factors(concepts[order].contiguous(), codes[:, order].contiguous(), own, objective=tuple(history))


def _objective_of(square: float, scores: Tensor, gram: Tensor, codes: Tensor, alpha: float) -> float:
    """The objective without Z: ½(‖Z‖² - 2⟨V, ZUᵀ⟩ + ⟨VᵀV, UUᵀ⟩) + alpha ΣV."""
    v = codes.double()
    fit = 0.5 * ((v.T @ v) * gram.double()).sum() - (v * scores.double()).sum()
    return 0.5 * square + float(fit + alpha * v.sum())


def _updated(z: Tensor, codes: Tensor, concepts: Tensor) -> Tensor:
    """Set each concept in turn to its optimum in the unit ball; one that is out of use takes over a bad fit."""
    weights, targets = codes.T @ codes, codes.T @ z
    concepts = concepts.clone()
    unused = []
    for index, weight in enumerate(weights.diagonal().tolist()):
        if weight <= 1e-12 * max(float(weights.diagonal().max()), 1e-30):
            unused.append(index)
            continue
        concepts[index] += (targets[index] - weights[index] @ concepts) / weight
        concepts[index] /= concepts[index].norm().clamp_min(1.0)
    if unused:
        worst = (z - codes @ concepts).norm(dim=1).topk(len(unused)).indices
        concepts[unused] = _unit(z[worst])
        # Their activations are zeros: nothing is lost.
    return concepts


def spread_rows(states: Float[Tensor, "n d"], k: int, seed: int) -> Float[Tensor, "k d"]:
    """Draw k rows far from one another in angle, scaled to length 1, as k-means++ does (Arthur and Vassilvitskii 2007).

    Each next row is drawn with a chance in proportion to its squared distance from the nearest one drawn before.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = _unit(states)
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    nearest = torch.full((len(rows),), torch.inf, device=rows.device, dtype=rows.dtype)
    while len(chosen) < k:
        nearest = torch.minimum(nearest, (2 - 2 * rows @ rows[chosen[-1]]).clamp_min(0))
        weights = nearest.double().cpu()
        weights[chosen] = 0
        if float(weights.sum()) <= 0:
            # All that is left are copies of what was drawn.
            weights = torch.ones(len(rows), dtype=torch.float64)
            weights[chosen] = 0
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return rows[chosen].clone()


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
