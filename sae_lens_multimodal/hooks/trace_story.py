"""From a causal trace to features: the hottest cell, the SAE's features there, and the ablation that confirms them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from sae_lens import SAE

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, NoGapError, SAEMismatchError, SelectionError
from sae_lens_multimodal.hooks.attribute import chosen_tokens
from sae_lens_multimodal.hooks.metrics import Target
from sae_lens_multimodal.hooks.saes import check_sae
from sae_lens_multimodal.hooks.trace import Positions, causal_trace
from sae_lens_multimodal.hooks.trace_corruptions import Corruption
from sae_lens_multimodal.hooks.trace_findings import (
    Confirmation,
    FeatureFinding,
    HeldOut,
    MeanAblation,
    Reference,
    TraceStory,
)
from sae_lens_multimodal.hooks.trace_parts import HOOKS, Part
from sae_lens_multimodal.hooks.trace_plan import Prompt, check_gap, prepare
from sae_lens_multimodal.hooks.trace_result import CausalTrace, Cell, MetricName
from sae_lens_multimodal.hooks.trace_site import Means, Site

logger = logging.getLogger(__name__)

FAINT = 0.05
"""Share of the answer below which a cell's features explain nothing, and that is said."""
CANDIDATES = 64
"""Features that are tried: those whose part in the value changes most."""
RANDOM_DRAWS = 8
"""Random sets of as many other features that the confirmation is held against."""
NEAREST = 4
"""Each random feature is one of this many others whose weight is next to a found feature's."""

Explanations: TypeAlias = "Mapping[int, str] | Mapping[str, Mapping[int, str]]"
"""What features stand for, by number; or, of several SAEs, by the SAE's hook and then by number."""
Places: TypeAlias = dict[tuple[str, int], SAE[Any]]
"""SAEs by the part and layer that they read."""


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
    cell: Cell | None = None,
    metric: MetricName | None = None,
    min_gap: float | None = 0.05,
    n_features: int = 5,
    explanations: Explanations | None = None,
    held_out: Sequence[HeldOut] = (),
    reference: Reference | Sequence[Prompt] | None = None,
    seed: int = 0,
    tokens_per_pass: int | None = None,
    progress: bool = False,
) -> TraceStory:
    """Trace an answer, go to the hottest cell that an SAE reads, and find and confirm the features that carry it.

    Cells at tokens that the corruption itself changed are passed over where there are others: restoring those undoes
    the corruption, so that they are hot in every model. Features are chosen by what their clean activations bring back
    to the corrupted run, and what their corrupted ones take from the clean run. Then they are ablated and exchanged in
    the clean run, one by one, together, and beside random sets of other features of like weight. Being chosen on the
    same prompts flatters them; `held_out` pairs say what is left where they were not.

    Activations of 0 may be as strange to the model as no answer at all. With `reference` prompts activations are put at
    their means over these too (mean ablation, as in Wang et al. 2023 and Marks et al. 2025): those of the features, of
    all others, and the whole value, which says how much there is to be lost.

    Args:
        model: The model, without edits.
        saes: An SAE on the residual stream, the attention's or the MLP's output of a block; or several at different
            hooks, for the hottest cell among theirs.
        clean: As in `causal_trace`, like all that is not named here.
        corrupted: As there.
        answer: As there.
        against: As there.
        positions: As there.
        cell: A cell of a trace over the same positions, at a part and layer that an SAE reads; None for the hottest.
        metric: As there; None for the logit difference where there is another answer, else the log-probability, for a
            probability near 1 hides what a single feature does.
        min_gap: As there.
        n_features: How many features to name and ablate.
        explanations: What features stand for, by number, where that is known; of several SAEs, such a mapping for the
            name of each one's hook.
        held_out: Other pairs of prompts with the same answer, such as the same question about other pictures.
        reference: Prompts like the clean one with answers of all kinds, such as the same question about other pictures.
        seed: Of the random sets.
        tokens_per_pass: As there.
        progress: Show bars.

    Raises:
        SAEMismatchError: an SAE does not fit the model, or reads something that is not traced.
        ConfigError: `n_features` is below 1, two SAEs read one hook, it is not said to which SAE explanations belong,
            or no SAE reads the cell.
        NoGapError, SelectionError: as `causal_trace`, also for held-out pairs.
    """
    if n_features < 1:
        raise ConfigError(f"Got n_features={n_features}; expected 1 or more.")
    places = _places(model, list(saes) if isinstance(saes, list | tuple) else [cast("SAE[Any]", saes)])
    known = _by_hook(explanations, [_hook(*place) for place in places])
    metric = metric or ("log_probability" if against is None else "logit_difference")
    trace = causal_trace(
        model, clean, corrupted, answer=answer, against=against, parts=_parts(places), positions=positions,
        metric=metric, min_gap=min_gap, tokens_per_pass=tokens_per_pass, progress=progress,
    )  # fmt: skip
    _check_some_gap(trace.clean[metric], trace.corrupted[metric])
    cell = _hottest(trace, places) if cell is None else _given(trace, places, cell)
    if cell.restored < FAINT:
        logger.warning(
            "the hottest cell that an SAE reads brings only %.3f of the answer back; take an SAE of a layer to which "
            "the answer has moved on, or name a cell.",
            cell.restored,
        )
    sae, name = places[cell.part, cell.layer], _hook(cell.part, cell.layer)
    plan = prepare(model, clean, corrupted, answer=answer, against=against, hooks=[name], metric=metric)
    site = Site.of(plan, sae, name, trace.units[cell.unit].positions, tokens_per_pass)
    others = [_elsewhere(model, site, pair, answer, against, min_gap) for pair in held_out]
    if reference is not None and not isinstance(reference, Reference):
        reference = Reference(reference)
    means = None if reference is None else Means.of(model, site, reference)
    return _told(trace, cell, site, others, means, n_features, known.get(name, {}), seed)


def _check_some_gap(clean: float, corrupted: float) -> None:
    """Check that there is something to have a share of, even where a pair without a gap is let through."""
    if clean == corrupted:
        raise NoGapError(
            f"The clean and the corrupted run both have {clean:.4g} of what is measured, so that features can bring "
            "nothing back and take nothing away; corrupt more, or choose a prompt that the model answers."
        )


def _places(model: VisionLanguageModel, saes: Sequence[SAE[Any]]) -> Places:
    found: Places = {}
    for sae in saes:
        place = _place(model, sae)
        if place in found:
            raise ConfigError(f"Got two SAEs at {_hook(*place)}; expected one at each hook.")
        found[place] = sae
    if not found:
        raise ConfigError("Got no SAE; expected one or several at different hooks.")
    return found


def _place(model: VisionLanguageModel, sae: SAE[Any]) -> tuple[str, int]:
    name = check_sae(model, sae)
    point = model.hooks.resolve(name)
    for part in HOOKS:
        if point.layer is not None and name == _hook(part, point.layer):
            return part, point.layer
    raise SAEMismatchError(f"Got an SAE at {name}; a trace restores {', '.join(HOOKS.values())} of each block.")


def _hook(part: str, layer: int) -> str:
    return f"blocks.{layer}.{HOOKS[part]}"


def _by_hook(explanations: Explanations | None, names: Sequence[str]) -> dict[str, Mapping[int, str]]:
    """Explanations by hook; numbers alone say too little where there are several SAEs."""
    if not explanations:
        return {}
    if all(isinstance(key, str) for key in explanations):
        strangers = sorted(set(cast("Mapping[str, Any]", explanations)) - set(names))
        if strangers:
            raise ConfigError(f"Got explanations for {', '.join(strangers)}; the SAEs read {', '.join(names)}.")
        return dict(cast("Mapping[str, Mapping[int, str]]", explanations))
    if len(names) > 1:
        raise ConfigError(
            f"Got explanations by number for {len(names)} SAEs, of which each has a feature of every number; give "
            f'them by hook, such as {{"{names[0]}": {{12: "red things"}}}}.'
        )
    return {names[0]: cast("Mapping[int, str]", explanations)}


def _parts(places: Places) -> list[Part]:
    """What is traced: what SAEs read first, and always what attention and MLP give."""
    read: list[Part] = [part for part in HOOKS if any(part == place[0] for place in places)]
    return [*read, *(part for part in ("attn_out", "mlp_out") if part not in read)]


def _hottest(trace: CausalTrace, places: Places) -> Cell:
    """The hottest cell that an SAE reads, at tokens that the corruption left alone where there are such."""
    spared = [unit for unit in range(len(trace.units)) if not trace.is_corrupted(unit)]
    units = spared or list(range(len(trace.units)))
    found = []
    for part, layer in places:
        shares = trace.part(part)[trace.layers.index(layer)].nan_to_num(nan=float("-inf"))
        unit = units[int(shares[units].argmax())]
        found.append(Cell(part, layer, unit, trace.units[unit].label, float(shares[unit])))
    return max(found, key=lambda one: one.restored)


def _given(trace: CausalTrace, places: Places, cell: Cell) -> Cell:
    if (cell.part, cell.layer) not in places:
        read = ", ".join(_hook(*one) for one in places)
        raise ConfigError(f"Got a cell at {cell.part} of layer {cell.layer}; the SAEs read {read}.")
    if not 0 <= cell.unit < len(trace.units) or trace.units[cell.unit].label != cell.label:
        raise ConfigError(f"Got the cell {cell.label!r}, which is not among the positions; trace the same ones again.")
    share = float(trace.part(cell.part)[trace.layers.index(cell.layer), cell.unit])
    return cell._replace(restored=share)


def _elsewhere(
    model: VisionLanguageModel,
    site: Site,
    pair: HeldOut,
    answer: Target | None,
    against: Target | None,
    min_gap: float | None,
) -> Site:
    """The same SAE at the corresponding tokens of another pair of prompts."""
    ids = {"answer": pair.answer, "against": pair.against}
    if pair.answer is None:
        ids["answer"] = answer if answer is not None else site.plan.answer[0]
    if pair.against is None:
        ids["against"] = against
    plan = prepare(model, pair.clean, pair.corrupted, hooks=[site.name], metric=site.plan.metric, **ids)
    check_gap(plan, min_gap)
    _check_some_gap(plan.before[plan.metric], plan.after[plan.metric])
    if pair.tokens is not None:
        positions = chosen_tokens(model, plan.prompt, plan.clean_batch, pair.tokens)[0].nonzero()[:, 0].tolist()
    elif plan.n_tokens == site.plan.n_tokens:
        positions = site.places.tolist()
    else:
        raise SelectionError(
            f"A held-out prompt has {plan.n_tokens} tokens, the traced one {site.plan.n_tokens}; say which of its "
            "tokens correspond to the hot cell's: HeldOut(..., tokens=...)."
        )
    return Site.of(plan, site.sae, site.name, positions, site.tokens_per_pass)


def _told(
    trace: CausalTrace,
    cell: Cell,
    site: Site,
    held_out: Sequence[Site],
    means: Means | None,
    n_features: int,
    explanations: Mapping[int, str],
    seed: int,
) -> TraceStory:
    active = site.active()
    chosen, alone = _chosen(site, active, n_features)
    singles = [[one] for one in chosen]
    lost, exchanged = site.ablated(singles), site.exchanged(singles)
    averaged = [None] * len(singles) if means is None else site.mean_ablated(singles, means)
    draws = _draws(site, [one for one in active if one not in chosen], chosen, seed)
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
                mean_ablated=averaged[at],
                explanation=explanations.get(one) or None,
            )
            for at, one in enumerate(chosen)
        ],
        restored_all=site.share_of(site.all_features()),
        together=_confirmed(site, chosen, draws, means),
        held_out=[_confirmed(one, chosen, draws, means) for one in held_out],
    )


def _confirmed(site: Site, chosen: Sequence[int], draws: Sequence[Sequence[int]], means: Means | None) -> Confirmation:
    """What a set of features does beside random ones."""
    sets = [list(chosen), *map(list, draws)]
    (restored, *others), (ablated, *other_ablated), (exchanged, *other_exchanged) = (
        measure(sets) for measure in (site.restored, site.ablated, site.exchanged)
    )
    weight = site.weight()
    own = float(weight[list(chosen)].sum())
    return Confirmation(
        restored=restored,
        ablated=ablated,
        exchanged=exchanged,
        restored_random=_mean(others),
        ablated_random=_mean(other_ablated),
        exchanged_random=_mean(other_exchanged),
        n_random=len(draws),
        weight_random=_mean([float(weight[list(one)].sum()) for one in draws]) / own if own else 0.0,
        mean_ablated=None if means is None else _mean_ablated(site, chosen, draws, means),
    )


def _mean_ablated(site: Site, chosen: Sequence[int], draws: Sequence[Sequence[int]], means: Means) -> MeanAblation:
    """What is lost where features are put at what they usually are."""
    every = site.moved_by(means)
    rest = [one for one in every if one not in set(chosen)]
    found, others, all_features, *random = site.mean_ablated([chosen, rest, every, *draws], means)
    return MeanAblation(
        found=found,
        others=others,
        all_features=all_features,
        value=site.without_value(means),
        random=_mean(random) if random else None,
    )


def _chosen(site: Site, active: Sequence[int], n_features: int) -> tuple[list[int], dict[int, float]]:
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


def _draws(site: Site, others: Sequence[int], chosen: Sequence[int], seed: int) -> list[list[int]]:
    """Random sets of the other features, each like a chosen one in weight; none where there are too few."""
    if not chosen or len(others) < len(chosen):
        return []
    weight = site.weight()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(RANDOM_DRAWS):
        left, mine = list(others), []
        for one in chosen:
            near = sorted(left, key=lambda other: abs(float(weight[other]) - float(weight[one])))[:NEAREST]
            mine.append(near[int(torch.randint(len(near), (1,), generator=generator))])
            left.remove(mine[-1])
        found.append(mine)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
