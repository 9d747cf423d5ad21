"""Thresholds of a saved BatchTopK SAE that let as many features fire on a token of one modality as of another."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from torch import Tensor

from sae_lens_multimodal.hooks.saes import CHUNK_TOKENS, inference_sae
from sae_lens_multimodal.training.metrics import MODALITIES
from sae_lens_multimodal.training.tokens import LabelledBatch

logger = logging.getLogger(__name__)

THRESHOLD_BATCHES = 10
"""Training batches from which thresholds are estimated."""
_KEPT_PER_K = 16
_KEPT_AT_LEAST = 512
"""So many of each token's largest values are kept to find thresholds among: more than ever fire."""
_MOST_TOKENS = 4096
"""Tokens of each modality among which thresholds are found, at most."""
_STEPS = 12
_ROUNDS = 12
_WIDEST = 8.0
_SMALLEST = 1e-9


@dataclass
class Firings:
    """The largest feature activations of the tokens of one modality, and which features they are of."""

    n_tokens: int = 0
    values: list[Float[Tensor, " n"]] = field(default_factory=list)
    features: list[Int[Tensor, " n"]] = field(default_factory=list)

    def add(self, activations: Float[Tensor, "n d_sae"], count: int) -> None:
        """Keep at most the `count` largest positive activations of each token."""
        largest = activations.topk(min(count, activations.shape[1]), dim=1, sorted=False)
        positive = largest.values > 0
        self.n_tokens += len(activations)
        self.values.append(largest.values[positive].float().cpu())
        self.features.append(largest.indices[positive].int().cpu())

    def joined(self) -> Firings:
        """The same with everything in one tensor each."""
        return Firings(self.n_tokens, [torch.cat(self.values)], [torch.cat(self.features).long()])

    def l0(self, thresholds: Float[Tensor, " d_sae"]) -> float:
        """How many features fire on a token with these thresholds."""
        pairs = zip(self.values, self.features, strict=True)
        return sum(int((values > thresholds[features.long()]).sum()) for values, features in pairs) / self.n_tokens


@torch.no_grad()
def collect_firings(sae: SAE[Any], batches: Iterable[LabelledBatch], k: float) -> dict[str, Firings]:
    """What the features of a saved SAE would be on tokens of each modality if there were no threshold.

    Args:
        sae: a JumpReLU SAE, as SAE-Lens saves a BatchTopK SAE.
        batches: activations, as the saved SAE takes them.
        k: how many features are meant to fire on a token.
    """
    firings = {name: Firings() for name in MODALITIES}
    for activations, modality in batches:
        for name, code in MODALITIES.items():
            rows = activations[(modality == code).to(activations.device)]
            rows = rows[: _MOST_TOKENS - firings[name].n_tokens]
            for start in range(0, len(rows), CHUNK_TOKENS):
                chunk = rows[start : start + CHUNK_TOKENS].to(sae.W_dec.device)
                # What JumpReLU compares with its threshold.
                hidden = sae.process_sae_in(chunk) @ sae.W_enc + sae.b_enc
                firings[name].add(hidden, max(_KEPT_AT_LEAST, int(_KEPT_PER_K * k)))
    return {name: firing for name, firing in firings.items() if firing.n_tokens}


def balanced_thresholds(firings: Mapping[str, Firings], k: float, d_sae: int) -> Float[Tensor, " d_sae"] | None:
    """Find a threshold for each feature such that as many features fire on a token of one modality as of the other.

    A feature takes the threshold of the modality that it fires on more often, so there are two thresholds. On average
    over all tokens `k` features fire; of all pairs of thresholds that do this, the one is taken with which the
    modalities are nearest to each other, and so to `k`. One modality has one threshold.

    Returns:
        The thresholds; None where nothing fired.
    """
    firings = {name: firing.joined() for name, firing in firings.items()}
    if not any(len(firing.values[0]) for firing in firings.values()):
        return None
    alone = [_threshold_for(firing.values[0], k * firing.n_tokens) for firing in firings.values()]
    if len(alone) == 1:
        return torch.full((d_sae,), alone[0])
    rates = [
        torch.bincount(firing.features[0][firing.values[0] > own], minlength=d_sae).double() / firing.n_tokens
        for firing, own in zip(firings.values(), alone, strict=True)
    ]
    owner = torch.stack(rates).argmax(0)
    pair = _Pair(list(firings.values()), owner, k)
    apart = math.log(max(alone[1], _SMALLEST) / max(alone[0], _SMALLEST))
    span = min(max(2 * abs(apart), 1.0), _WIDEST)
    tried = {ratio: abs(pair.gap(ratio)) for ratio in (span * step / _STEPS for step in range(-_STEPS, _STEPS + 1))}
    step = span / _STEPS
    for _ in range(_ROUNDS):
        step /= 2
        best = min(tried, key=tried.__getitem__)
        tried.update({ratio: abs(pair.gap(ratio)) for ratio in (best - step, best + step)})
    return pair.thresholds(min(tried, key=tried.__getitem__))


class _Pair:
    """Two modalities' firings, and the thresholds that follow from how many times as high the second's is."""

    def __init__(self, firings: list[Firings], owner: Int[Tensor, " d_sae"], k: float) -> None:
        self._owner = owner
        self._values = torch.cat([firing.values[0] for firing in firings])
        self._owners = torch.cat([owner[firing.features[0]] for firing in firings])
        self._tokens = [firing.n_tokens for firing in firings]
        self._first = len(firings[0].values[0])
        self._wanted = k * sum(self._tokens)

    def _lowest(self, log_ratio: float) -> tuple[float, Float[Tensor, " n"]]:
        """The first modality's threshold, and all values in units in which it is the threshold of all."""
        weights = torch.tensor([1.0, math.exp(log_ratio)])
        scaled = self._values / weights[self._owners]
        return _threshold_for(scaled, self._wanted), scaled

    def gap(self, log_ratio: float) -> float:
        """How many more features fire on a token of the first modality than on one of the second."""
        lowest, scaled = self._lowest(log_ratio)
        fires = scaled > lowest
        first, second = int(fires[: self._first].sum()), int(fires[self._first :].sum())
        return first / self._tokens[0] - second / self._tokens[1]

    def thresholds(self, log_ratio: float) -> Float[Tensor, " d_sae"]:
        """The threshold of every feature."""
        lowest, _ = self._lowest(log_ratio)
        return torch.tensor([lowest, lowest * math.exp(log_ratio)])[self._owner]


def _threshold_for(values: Float[Tensor, " n"], count: float) -> float:
    """The threshold that so many values are above."""
    count = round(max(count, 0))
    if count >= len(values):
        return 0.0
    # Between two values rather than at one, so that rounding elsewhere moves neither across.
    first, above = len(values) - count, len(values) - count + 1
    low = values.kthvalue(first).values.item()
    high = values.kthvalue(above).values.item() if count else low * (1 + 1e-3)
    return (low + high) / 2


@torch.no_grad()
def settle_thresholds(
    sae: BatchTopKTrainingSAE, batches: Iterator[LabelledBatch], *, balanced: bool = True
) -> Float[Tensor, " d_sae"] | None:
    """Estimate the thresholds with which a BatchTopK SAE is saved, from its final weights.

    SAE-Lens keeps one running mean over all tokens: it remembers early weights, and lets the modality with the larger
    activations fire on the other's account.

    Args:
        sae: the SAE after training, normalisation folded in: what its saved form takes are plain activations.
        batches: training batches; `THRESHOLD_BATCHES` are taken.
        balanced: whether each modality gets `k` features a token; otherwise `k` on average over all tokens.

    Returns:
        The thresholds that `save_with_thresholds` was given; None where nothing fires.
    """
    plain = inference_sae(sae)
    taken = [next(batches) for _ in range(THRESHOLD_BATCHES)]
    firings = collect_firings(plain, taken, sae.cfg.k)
    if not balanced:
        firings = {"all": _together(firings)}
    thresholds = balanced_thresholds(firings, sae.cfg.k, sae.cfg.d_sae)
    if thresholds is None:
        return None
    save_with_thresholds(sae, thresholds)
    fired = {name: round(firing.l0(thresholds), 2) for name, firing in firings.items()}
    logger.info("features that fire on a token with the saved thresholds: %s; k is %g", fired, sae.cfg.k)
    return thresholds


def save_with_thresholds(sae: BatchTopKTrainingSAE, thresholds: Float[Tensor, " d_sae"]) -> None:
    """Have an SAE saved with a threshold for each feature, in units of the saved SAE, in place of its one threshold."""
    upstream = type(sae).process_state_dict_for_saving_inference

    def with_thresholds(self: BatchTopKTrainingSAE, state_dict: dict[str, Any]) -> None:
        upstream(self, state_dict)
        state_dict["threshold"] = thresholds.to(state_dict["threshold"])

    # As SAE-Lens replaces a method of one SAE to compile it; its class, and with it every check, stays what it is.
    vars(sae)["process_state_dict_for_saving_inference"] = MethodType(with_thresholds, sae)


def _together(firings: Mapping[str, Firings]) -> Firings:
    return Firings(
        sum(firing.n_tokens for firing in firings.values()),
        [values for firing in firings.values() for values in firing.values],
        [features for firing in firings.values() for features in firing.features],
    )
