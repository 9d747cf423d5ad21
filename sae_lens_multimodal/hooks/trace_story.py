"""From a causal trace to features: the hottest cell, the SAE's features there, and the ablation that confirms them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SAEMismatchError
from sae_lens_multimodal.hooks.metrics import Target
from sae_lens_multimodal.hooks.saes import check_sae, decoder_directions, encode_tokens, output_scale
from sae_lens_multimodal.hooks.trace import (
    Plan,
    Positions,
    Prompt,
    causal_trace,
    default_tokens,
    prepare,
)
from sae_lens_multimodal.hooks.trace_corruptions import Corruption
from sae_lens_multimodal.hooks.trace_parts import HOOKS, Part, added_by
from sae_lens_multimodal.hooks.trace_result import CausalTrace, Cell, MetricName
from sae_lens_multimodal.hooks.trace_run import KeptKeys, Recording, value_of

CANDIDATES = 64
"""Features that are tried: those whose part in the value changes most."""
RANDOM_DRAWS = 8
"""Random sets of as many other features that the confirmation is held against."""


@dataclass(frozen=True, kw_only=True)
class FeatureFinding:
    """One feature at the hot cell."""

    feature: int
    clean: float
    """Its largest activation there in the clean run."""
    corrupted: float
    """In the corrupted run."""
    restored: float
    """The share of the answer that it alone brings back when its clean activation is put into the corrupted run."""
    ablated: float
    """The share of the answer that is lost when it alone is ablated there in the clean run."""
    exchanged: float
    """The share that is lost when its corrupted activation is put into the clean run."""
    explanation: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceStory:
    """A trace, its hot cell, and the features that carry the answer there."""

    trace: CausalTrace
    cell: Cell
    """The hottest cell at which there is an SAE."""
    hottest: Cell
    """The hottest cell of the whole trace."""
    hook_name: str
    """Where the SAE reads."""
    n_active: int
    """Features that are active there in either run."""
    features: list[FeatureFinding] = field(repr=False)
    """Chosen one after the other: beside those before it each brings most back and takes most away."""
    restored_all: float
    """The share that all of the SAE's features bring back; the rest of the cell's is in the SAE's error."""
    restored_together: float
    """The share that the features listed bring back together."""
    ablated_together: float
    """The share of the answer that is lost when they are ablated together in the clean run."""
    exchanged_together: float
    """The share that is lost when their corrupted activations are put into the clean run together."""
    ablated_random: float
    """The mean of `ablated_together` over sets of as many other features there."""
    exchanged_random: float
    """The mean of `exchanged_together` over the same sets."""
    n_random: int
    """How many such sets there were; 0 where nothing else is active."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "trace": self.trace.to_dict(),
            "cell": self.cell._asdict(),
            "hottest": self.hottest._asdict(),
            "hook_name": self.hook_name,
            "n_active": self.n_active,
            "restored_all": self.restored_all,
            "restored_together": self.restored_together,
            "ablated_together": self.ablated_together,
            "exchanged_together": self.exchanged_together,
            "ablated_random": self.ablated_random if self.n_random else None,
            "exchanged_random": self.exchanged_random if self.n_random else None,
            "n_random": self.n_random,
            "features": [vars(one) for one in self.features],
        }


@torch.no_grad()
def trace_features(
    model: VisionLanguageModel,
    saes: SAE[Any] | Sequence[SAE[Any]],
    clean: Prompt,
    corrupted: Prompt | Corruption,
    *,
    answer: Target | None = None,
    against: Target | None = None,
    positions: Positions = "all",
    metric: MetricName | None = None,
    min_gap: float | None = 0.05,
    n_features: int = 5,
    explanations: Mapping[int, str] | None = None,
    seed: int = 0,
    tokens_per_pass: int | None = None,
    progress: bool = False,
) -> TraceStory:
    """Trace an answer, go to the hottest cell that an SAE reads, and find and confirm the features that carry it.

    Features are chosen by what their clean activations bring back to the corrupted run, and what their corrupted ones
    take from the clean run. Then they are ablated in the clean run at the same tokens, one by one, together, and beside
    random sets of other features active there.

    Args:
        model: The model, without edits.
        saes: An SAE on the residual stream, the attention's or the MLP's output of a block; or several, for the
            hottest cell among theirs.
        clean: As in `causal_trace`, like all that is not named here.
        corrupted: As there.
        answer: As there.
        against: As there.
        positions: As there.
        metric: As there; None for the logit difference where there is another answer, else the log-probability, for a
            probability near 1 hides what a single feature does.
        min_gap: As there.
        n_features: How many features to name and ablate.
        explanations: What features stand for, by number, where that is known; of the SAE at the hot cell.
        seed: Of the random sets.
        tokens_per_pass: As there.
        progress: Show bars.

    Raises:
        SAEMismatchError: an SAE does not fit the model, or reads something that is not traced.
        ConfigError: `n_features` is below 1.
        NoGapError, SelectionError: as `causal_trace`.
    """
    if n_features < 1:
        raise ConfigError(f"Got n_features={n_features}; expected 1 or more.")
    metric = metric or ("log_probability" if against is None else "logit_difference")
    places = {_place(model, sae): sae for sae in (saes if isinstance(saes, list | tuple) else [saes])}
    parts: list[Part] = [part for part in HOOKS if any(part == place[0] for place in places)]
    trace = causal_trace(
        model,
        clean,
        corrupted,
        answer=answer,
        against=against,
        parts=[*parts, *(part for part in ("attn_out", "mlp_out") if part not in parts)],
        positions=positions,
        metric=metric,
        min_gap=min_gap,
        tokens_per_pass=tokens_per_pass,
        progress=progress,
    )
    cell = max((_best(trace, *place) for place in places), key=lambda one: one.restored)
    sae = places[cell.part, cell.layer]
    name = check_sae(model, sae)
    plan = prepare(model, clean, corrupted, answer=answer, against=against, hooks=[name], metric=metric)
    site = _Site.of(plan, sae, name, trace.units[cell.unit].positions, tokens_per_pass or default_tokens(plan))
    return _told(trace, cell, site, n_features, explanations or {}, seed)


def _place(model: VisionLanguageModel, sae: SAE[Any]) -> tuple[str, int]:
    name = check_sae(model, sae)
    point = model.hooks.resolve(name)
    for part, hook in HOOKS.items():
        if point.layer is not None and name == f"blocks.{point.layer}.{hook}":
            return part, point.layer
    raise SAEMismatchError(f"Got an SAE at {name}; a trace restores {', '.join(HOOKS.values())} of each block.")


def _best(trace: CausalTrace, part: str, layer: int) -> Cell:
    shares = trace.part(part)[trace.layers.index(layer)].nan_to_num(nan=float("-inf"))
    unit = int(shares.argmax())
    return Cell(part, layer, unit, trace.units[unit].label, float(shares[unit]))


@dataclass(frozen=True, kw_only=True)
class _Site:
    """The SAE at the tokens of the hot cell, in both runs, and ways to run on from there."""

    plan: Plan
    sae: SAE[Any]
    name: str
    places: Tensor
    clean: Float[Tensor, "places d_in"]
    corrupted: Float[Tensor, "places d_in"]
    z_clean: Float[Tensor, "places d_sae"]
    z_corrupted: Float[Tensor, "places d_sae"]
    clean_keys: KeptKeys | None
    tokens_per_pass: int

    @classmethod
    def of(cls, plan: Plan, sae: SAE[Any], name: str, positions: Sequence[int], tokens_per_pass: int) -> _Site:
        point = plan.runner.point(name)
        places = torch.tensor(positions)
        one, two = (value_of(run.values[name], point)[0][places] for run in (plan.clean, plan.corrupted))
        return cls(
            plan=plan,
            sae=sae,
            name=name,
            places=places,
            clean=one,
            corrupted=two,
            z_clean=encode_tokens(sae, one).detach(),
            z_corrupted=encode_tokens(sae, two).detach(),
            clean_keys=plan.runner.keys_of(plan.clean),
            tokens_per_pass=tokens_per_pass,
        )

    @property
    def before(self) -> float:
        """The metric in the clean run."""
        return float(self.plan.measure(self.plan.clean.logits[None])[self.plan.metric])

    @property
    def after(self) -> float:
        """The metric in the corrupted run."""
        return float(self.plan.measure(self.plan.corrupted.logits[None])[self.plan.metric])

    def restored(self, sets: Sequence[Sequence[int]]) -> list[float]:
        """The share that each set of features brings back in the corrupted run."""
        found = self._run(self.plan.corrupted, self.plan.keys, [self._difference(one) for one in sets])
        return [(value - self.after) / (self.before - self.after) for value in found]

    def exchanged(self, sets: Sequence[Sequence[int]]) -> list[float]:
        """The share of the answer that is lost when each set's corrupted activations are put into the clean run."""
        found = self._run(self.plan.clean, self.clean_keys, [-self._difference(one) for one in sets])
        return [(self.before - value) / (self.before - self.after) for value in found]

    def ablated(self, sets: Sequence[Sequence[int]]) -> list[float]:
        """The share of the answer that is lost without each set of features in the clean run."""
        added = [-self._added(self.clean, self.z_clean, one) for one in sets]
        found = self._run(self.plan.clean, self.clean_keys, added)
        return [(self.before - value) / (self.before - self.after) for value in found]

    def all_features(self) -> Tensor:
        """What all features together add to the value, clean instead of corrupted."""
        return added_by(self.sae, self.clean, None) - added_by(self.sae, self.corrupted, None)

    def weight(self) -> Float[Tensor, " d_sae"]:
        """How much each feature's part in the value differs between the runs."""
        norms = decoder_directions(self.sae, range(self.sae.cfg.d_sae)).norm(dim=-1)
        return (self.z_clean - self.z_corrupted).abs().sum(0) * norms.to(self.z_clean)

    def share_of(self, added: Tensor) -> float:
        """The share that something added to the corrupted value brings back."""
        value = self._run(self.plan.corrupted, self.plan.keys, [added])[0]
        return (value - self.after) / (self.before - self.after)

    def _difference(self, features: Sequence[int]) -> Tensor:
        """What features add in the clean run, less what they add in the corrupted one."""
        clean = self._added(self.clean, self.z_clean, features)
        return clean - self._added(self.corrupted, self.z_corrupted, features)

    def _added(self, acts: Tensor, z: Tensor, features: Sequence[int]) -> Tensor:
        chosen = list(features)
        added = z[:, chosen] @ decoder_directions(self.sae, chosen).to(z)
        scale = output_scale(self.sae, acts)
        return (added if scale is None else added * scale.to(added)).detach().float()

    @torch.no_grad()
    def _run(self, recording: Recording, keys: KeptKeys | None, added: Sequence[Tensor]) -> list[float]:
        """The metric of a run in which something is added to the hook's value at the cell's tokens, for each."""
        runner, point = self.plan.runner, self.plan.runner.point(self.name)
        layer = int(point.layer or 0)
        start = min(int(self.places.min()), self.plan.n_tokens - runner.keep_logits) if keys is not None else 0
        step = max(1, self.tokens_per_pass // (self.plan.n_tokens - start))
        found: list[float] = []
        for at in range(0, len(added), step):
            some = torch.stack(list(added[at : at + step]))

            def change(value: Tensor, some: Tensor = some) -> Tensor:
                changed = value.clone()
                changed[:, self.places - start] += some.reshape(len(some), len(self.places), -1).to(value)
                return changed

            hidden = recording.calls[layer].hidden[:, start:].expand(len(some), -1, -1)
            logits = runner.go_on(recording, layer, hidden, keys=keys, changes={self.name: change})
            found += self.plan.measure(logits)[self.plan.metric].tolist()
        return found


def _told(
    trace: CausalTrace, cell: Cell, site: _Site, n_features: int, explanations: Mapping[int, str], seed: int
) -> TraceStory:
    active = ((site.z_clean != 0) | (site.z_corrupted != 0)).any(0).nonzero()[:, 0].tolist()
    chosen, alone = _chosen(site, active, n_features)
    singles = [[one] for one in chosen]
    lost, exchanged = site.ablated(singles), site.exchanged(singles)
    draws = _draws([one for one in active if one not in chosen], len(chosen), seed)
    return TraceStory(
        trace=trace,
        cell=cell,
        hottest=trace.top(1)[0],
        hook_name=site.name,
        n_active=len(active),
        features=[
            FeatureFinding(
                feature=one,
                clean=float(site.z_clean[:, one].max()),
                corrupted=float(site.z_corrupted[:, one].max()),
                restored=alone[one],
                ablated=lost[at],
                exchanged=exchanged[at],
                explanation=explanations.get(one) or None,
            )
            for at, one in enumerate(chosen)
        ],
        restored_all=site.share_of(site.all_features()),
        restored_together=site.restored([chosen])[0],
        ablated_together=site.ablated([chosen])[0],
        exchanged_together=site.exchanged([chosen])[0],
        ablated_random=_mean(site.ablated(draws)),
        exchanged_random=_mean(site.exchanged(draws)),
        n_random=len(draws),
    )


def _chosen(site: _Site, active: Sequence[int], n_features: int) -> tuple[list[int], dict[int, float]]:
    """The features chosen, and what each candidate brings back by itself.

    One after the other, because features that say one thing together may each do nothing alone; by what they bring back
    to the corrupted run and what exchanging them takes from the clean one, so that they are both enough and needed.
    """
    weight = site.weight()
    left = sorted((one for one in active if float(weight[one]) > 0), key=lambda one: -float(weight[one]))[:CANDIDATES]
    chosen: list[int] = []
    alone: dict[int, float] = {}
    while left and len(chosen) < n_features:
        sets = [[*chosen, one] for one in left]
        restored, exchanged = site.restored(sets), site.exchanged(sets)
        alone = alone or dict(zip(left, restored, strict=True))
        best = left[max(range(len(left)), key=lambda at: restored[at] + exchanged[at])]
        chosen.append(best)
        left.remove(best)
    return chosen, alone


def _draws(others: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """Random sets of the other features; none where there are too few."""
    if not size or len(others) < size:
        return []
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(others), generator=generator).tolist() for _ in range(RANDOM_DRAWS))
    return [[others[at] for at in order[:size]] for order in orders]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
