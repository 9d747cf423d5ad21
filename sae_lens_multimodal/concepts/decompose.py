"""The ways to take states apart into concepts, each a plain function on tensors with a seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multimodal.concepts.semi_nmf import Factors, objective, semi_nmf
from sae_lens_multimodal.errors import ConfigError, SAEMismatchError
from sae_lens_multimodal.hooks.concept_sae import nearest_codes, optimal_codes, precise_dtype
from sae_lens_multimodal.hooks.saes import decoder_directions, encode_tokens, output_scale, same_model

if TYPE_CHECKING:
    from sae_lens import SAE

    from sae_lens_multimodal.concepts.states import ConceptStates

Method: TypeAlias = Literal["semi_nmf", "dictionary_learning", "pca", "kmeans", "simple", "random", "sae"]
"""How concepts are found; see `find_concepts`."""
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True, eq=False)
class SAEFactors(Factors):
    """Some features of an SAE as concepts."""

    features: tuple[int, ...] = ()
    """Which feature each concept is."""


def dictionary_learning(
    states: Float[Tensor, "n d"], k: int, *, alpha: float = 0.0, seed: int = 0, max_rounds: int = 50
) -> Factors:
    """The same problem as `semi_nmf`, by scikit-learn's `DictionaryLearning` with positive codes; slower.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    fitted = _sklearn("decomposition").DictionaryLearning(
        k, alpha=alpha, positive_code=True, fit_algorithm="cd", max_iter=max_rounds, random_state=seed
    )
    with warnings.catch_warnings():
        # It warns of inner steps that have not converged.
        warnings.simplefilter("ignore")
        fitted.fit(states.cpu().double().numpy())
    concepts = torch.from_numpy(fitted.components_).to(states)
    codes = _codes(states, concepts, alpha)
    return Factors(concepts, codes, objective=(objective(states, concepts, codes, alpha),))


def pca(states: Float[Tensor, "n d"], k: int, *, seed: int = 0) -> Factors:
    """Both ends of k principal components about the mean, by scikit-learn: 2k concepts, k + i the other end of i.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    if not 1 <= k <= min(states.shape):
        raise ConfigError(
            f"Got k={k} for states of the shape {tuple(states.shape)}; expected 1 to {min(states.shape)}."
        )
    fitted = _sklearn("decomposition").PCA(k, random_state=seed).fit(states.cpu().double().numpy())
    components = torch.from_numpy(fitted.components_).to(states)
    mean = torch.from_numpy(fitted.mean_).to(states)
    concepts = torch.cat([components, -components])
    return Factors(concepts, ((states - mean) @ concepts.T).clamp_min(0), bias=mean)


def kmeans(states: Float[Tensor, "n d"], k: int, *, seed: int = 0) -> Factors:
    """Centres of k-means, by scikit-learn. A state has the coefficient of its nearest centre, and 0 for the others.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    fitted = _sklearn("cluster").KMeans(k, n_init=4, random_state=seed).fit(states.cpu().double().numpy())
    concepts = torch.from_numpy(fitted.cluster_centers_).to(states)
    return Factors(concepts, nearest_codes(states @ concepts.T, concepts @ concepts.T))


def largest_rows(states: Float[Tensor, "n d"], k: int) -> Factors:
    """The simple baseline: the k longest states are the concepts, scaled to length 1."""
    return _rows(states, states.norm(dim=1).topk(k).indices)


def random_rows(states: Float[Tensor, "n d"], k: int, *, seed: int = 0) -> Factors:
    """A floor: k states drawn at random are the concepts, scaled to length 1."""
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))
    return _rows(states, order[:k].to(states.device))


def _rows(states: Tensor, chosen: Tensor) -> Factors:
    concepts = states[chosen] / states[chosen].norm(dim=1, keepdim=True).clamp_min(1e-12)
    return Factors(concepts, _codes(states, concepts))


def _codes(states: Tensor, concepts: Tensor, l1: float = 0.0) -> Tensor:
    precise = concepts.to(precise_dtype(states.device))
    return optimal_codes(states.to(precise) @ precise.T, precise @ precise.T, l1=l1).to(states)


def sae_features(states: Float[Tensor, "n d"], k: int, sae: SAE[Any]) -> SAEFactors:
    """The k features of an SAE that write most into these states, with their own activations and directions.

    What the SAE reconstructs with all of its other features is left out; `bias` is what it gives where none fires.

    Raises:
        SAEMismatchError: the SAE has another width, or fewer features than k.
    """
    if sae.cfg.d_in != states.shape[1] or sae.cfg.d_sae < k:
        raise SAEMismatchError(
            f"The SAE has d_in={sae.cfg.d_in} and {sae.cfg.d_sae} features; expected d_in={states.shape[1]}, the width "
            f"of the states, and at least {k} features."
        )
    if output_scale(sae, states[:1]) is not None:
        raise SAEMismatchError(
            f"The SAE normalises each state by itself ({sae.cfg.normalize_activations}), so its features are no fixed "
            "directions of the states; give one that does not."
        )
    with torch.no_grad():
        # The whole code of all states is never held, nor the decoder copied: a wide SAE's are the largest things here.
        lengths = decoder_directions(sae, range(sae.cfg.d_sae)).norm(dim=1).to(states)
        totals = torch.zeros_like(lengths)
        for part in states.split(512):
            totals += encode_tokens(sae, part).to(states).sum(0)
        chosen = (totals * lengths).topk(k).indices
        features = tuple(chosen.tolist())
        codes = encode_tokens(sae, states, features=features).to(states)
        return SAEFactors(
            decoder_directions(sae, features).to(states), codes, sae.b_dec.detach().to(states), features=features
        )


def check_origin(sae: SAE[Any], states: ConceptStates) -> None:
    """Check that an SAE was trained where states were read.

    Raises:
        SAEMismatchError: it names another hook or model.
    """
    hook, model = sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name
    if (hook and hook != states.hook_name) or (model and not same_model(model, states.model_name)):
        raise SAEMismatchError(
            f"The SAE is of {hook} of {model}, the states of {states.hook_name} of {states.model_name}; give the SAE "
            "that was trained there, or change sae.cfg.metadata where it is meant."
        )


def check_finite(states: Float[Tensor, "n d"]) -> None:
    """Check that states can be computed with.

    Raises:
        ConfigError: there are none, or some hold NaN or infinity.
    """
    if not len(states):
        raise ConfigError("Got no states; expected at least one. Gather more, or hold less out.")
    bad = int((~states.isfinite().all(dim=1)).sum())
    if bad:
        raise ConfigError(f"{bad} of {len(states)} states hold NaN or infinity; leave them out, or use float32.")


def decompose(
    states: Float[Tensor, "n d"],
    k: int,
    method: Method,
    *,
    alpha: float = 0.0,
    seed: int = 0,
    n_starts: int = 1,
    sae: SAE[Any] | None = None,
    offset: bool = False,
) -> Factors:
    """Take states apart by any of the methods.

    Raises:
        ConfigError: the method is unknown or wants an SAE, there are fewer states than concepts, or scikit-learn is
            wanted and not installed.
    """
    if not 1 <= k <= len(states):
        raise ConfigError(f"Got k={k} for {len(states)} states; expected 1 to {len(states)}. Gather more states.")
    ways: dict[str, Callable[[], Factors]] = {
        "semi_nmf": lambda: semi_nmf(states, k, alpha=alpha, seed=seed, n_starts=n_starts, offset=offset),
        "dictionary_learning": lambda: dictionary_learning(states, k, alpha=alpha, seed=seed),
        "pca": lambda: pca(states, k, seed=seed),
        "kmeans": lambda: kmeans(states, k, seed=seed),
        "simple": lambda: largest_rows(states, k),
        "random": lambda: random_rows(states, k, seed=seed),
    }
    if method == "sae":
        if sae is None:
            raise ConfigError("Got method='sae' without an SAE; give sae=..., whose features are meant.")
        return sae_features(states, k, sae)
    if method not in ways:
        raise ConfigError(f"Got method={method!r}; expected one of {_spell(METHODS)}.")
    return ways[method]()


def _spell(names: Sequence[str]) -> str:
    return ", ".join(names)


def _sklearn(module: str) -> Any:  # noqa: ANN401 - a module
    try:
        from importlib import import_module

        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ConfigError(
            "This method is scikit-learn's, which is not installed; run: pip install scikit-learn. semi_nmf, simple, "
            "random and sae need nothing more."
        ) from error
