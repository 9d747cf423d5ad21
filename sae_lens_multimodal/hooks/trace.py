"""Causal tracing: what restoring a part of a clean run in a corrupted one brings back of an answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.hook_points import HookPoint
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.attribute import chosen_tokens
from sae_lens_multimodal.hooks.metrics import Target
from sae_lens_multimodal.hooks.selection import Tokens
from sae_lens_multimodal.hooks.trace_corruptions import Corruption
from sae_lens_multimodal.hooks.trace_parts import HOOKS, Part, Restoring, bind, hooks_of
from sae_lens_multimodal.hooks.trace_plan import Plan, Prompt, check_gap, prepare
from sae_lens_multimodal.hooks.trace_result import CausalTrace, MetricName, Unit
from sae_lens_multimodal.hooks.trace_run import Change, check_layers, value_of, with_value
from sae_lens_multimodal.types import Modality

Positions: TypeAlias = "Tokens | Mapping[str, Tokens]"
"""Tokens that are restored one by one, or named groups that are restored as a whole."""


def causal_trace(
    model: VisionLanguageModel,
    clean: Prompt,
    corrupted: Prompt | Corruption,
    *,
    answer: Target | None = None,
    against: Target | None = None,
    parts: Part | Sequence[Part] = ("attn_out", "mlp_out"),
    positions: Positions = "all",
    layers: Sequence[int] | None = None,
    window: int = 1,
    metric: MetricName = "probability",
    min_gap: float | None = 0.05,
    tokens_per_pass: int | None = None,
    progress: bool = False,
) -> CausalTrace:
    """Restore clean values in the corrupted run, cell by cell, and measure how much of the answer returns.

    The share is (restored - corrupted) / (clean - corrupted). Many cells are rows of one pass. A pass starts at the
    restored layer, for what lies below is the corrupted run's, and at the first restored position, for what lies before
    keeps its keys and values; it ends with the logits of the answer's tokens alone. Cells at which the two runs are the
    same take no pass at all.

    Args:
        model: The model, without edits.
        clean: The prompt: a conversation, whose answer is then begun, or an encoded batch of one row.
        corrupted: A prompt of as many tokens, or how to corrupt the clean one: `ReplaceTokens`, `OtherImage`,
            `BlankRegion`, `ExchangeRegions`, `Counterfactual`, `Noise`.
        answer: The answer; of several tokens all are read. None for the token that the clean run puts first.
        against: Another answer: then the logit difference is measured too, where the two first differ.
        parts: `"resid"` (what enters the next block), `"attn_out"`, `"mlp_out"`, `"heads"`, `Head(3)`,
            `SAEFeatures(sae, [12])`, or several.
        positions: As `tokens` in `steer`, image tokens included, each restored by itself; or named groups of them,
            each restored as a whole, such as `{"the star": BoxTokens(box)}`. `"all"` leaves padding out.
        layers: The layers restored, or the middles of windows; None for all.
        window: How many layers are restored together, at the same positions.
        metric: What `restored` is a share of.
        min_gap: The least difference of the answer's probability, clean less corrupted, that is worth tracing, whatever
            the metric; a logit difference has to fall by 0.5 as well, a log-probability by 0.05. None for any pair.
        tokens_per_pass: Rows of a pass times their length; None for what suits the device.
        progress: Show a bar.

    Raises:
        NoGapError: clean and corrupted hardly differ, or the wrong way round.
        SelectionError: the prompts are not of one length, or the positions select nothing.
        ConfigError: a part, layer, window or metric that there is not.
        UnsupportedModelError: the family's blocks cannot be run by themselves.
    """
    wanted: list[Part] = list(parts) if isinstance(parts, list | tuple) else [cast("Part", parts)]
    numbers = _checked(model, wanted, layers, window, metric, against, tokens_per_pass)
    plan = prepare(
        model, clean, corrupted, answer=answer, against=against, hooks=hooks_of(model, wanted), metric=metric
    )
    restoring = bind(model, wanted, plan.clean, plan.corrupted)
    check_gap(plan, min_gap)
    units = units_of(model, plan, positions)
    return _restore_all(plan, restoring, numbers, window, units, tokens_per_pass or plan.tokens_per_pass, progress)


def units_of(model: VisionLanguageModel, plan: Plan, positions: Positions) -> list[Unit]:
    """Turn positions into what is restored together.

    Raises:
        SelectionError: they select nothing.
    """
    batch = plan.clean_batch
    if not isinstance(positions, Mapping):
        found = chosen_tokens(model, plan.prompt, batch, positions)[0].nonzero()[:, 0].tolist()
        tokens = model.token_strings(batch["input_ids"][0])
        return [Unit(_label(batch, tokens, one), (one,)) for one in found]
    if not positions:
        raise SelectionError("Got no groups of positions; expected at least one.")
    groups = {name: chosen_tokens(model, plan.prompt, batch, one)[0].nonzero()[:, 0] for name, one in positions.items()}
    return [Unit(name, tuple(one.tolist())) for name, one in groups.items()]


def _restore_all(
    plan: Plan,
    restoring: Sequence[Restoring],
    numbers: Sequence[int],
    window: int,
    units: Sequence[Unit],
    tokens_per_pass: int,
    progress: bool,
) -> CausalTrace:
    """Measure every cell."""
    shape = (len(restoring), len(numbers), len(units))
    values = {name: torch.full(shape, float("nan")) for name in plan.before}
    counts = [0, 0]
    cells = [(p, at) for p in range(len(restoring)) for at in range(len(numbers))]
    for p, at in tqdm(cells, desc="tracing", disable=not progress):
        inside = _window(numbers[at], window, len(plan.runner.blocks))
        inside = [layer for layer in inside if restoring[p].hook(layer) is not None]
        if not inside:
            continue
        for name, one in _restore(plan, restoring[p], inside, units, tokens_per_pass, counts).items():
            values[name][p, at] = one
    model = plan.runner.model
    return CausalTrace(
        answer=_spelt(model, plan.answer),
        against=None if plan.against is None else _spelt(model, plan.against),
        metric=plan.metric,
        corruption=plan.corruption,
        window=window,
        parts=[one.label for one in restoring],
        layers=list(numbers),
        units=list(units),
        tokens=model.token_strings(plan.clean_batch["input_ids"][0]),
        corrupted_tokens=model.token_strings(plan.corrupted_batch["input_ids"][0]),
        layout=plan.clean_batch.layout,
        clean=plan.before,
        corrupted=plan.after,
        values=values,
        n_passes=counts[0],
        n_skipped=counts[1],
        changed_inputs=plan.changed_inputs,
    )


def _restore(
    plan: Plan,
    part: Restoring,
    layers: Sequence[int],
    units: Sequence[Unit],
    tokens_per_pass: int,
    counts: list[int],
) -> dict[str, Float[Tensor, " units"]]:
    """Restore one part of some layers at every unit, by itself."""
    found = {name: torch.full((len(units),), value) for name, value in plan.after.items()}
    # one layer may lie on another device than the next
    differs = torch.stack([part.changed(layer).cpu() for layer in layers]).any(0)
    wanted = [index for index, unit in enumerate(units) if bool(differs[list(unit.positions)].any())]
    counts[1] += len(units) - len(wanted)
    # The latest positions together: a pass is as long as its earliest position needs.
    wanted.sort(key=lambda index: min(units[index].positions), reverse=True)
    for rows in _batches(plan, wanted, units, tokens_per_pass):
        logits = _pass(plan, part, layers, [units[index] for index in rows])
        counts[0] += 1
        for name, values in plan.measure(logits).items():
            found[name][rows] = values
    return found


def _batches(plan: Plan, wanted: Sequence[int], units: Sequence[Unit], tokens_per_pass: int) -> Iterator[list[int]]:
    rows: list[int] = []
    for index in wanted:
        cost = plan.row_cost(min(units[index].positions) if plan.keys is not None else 0)
        if rows and (len(rows) + 1) * cost > tokens_per_pass:
            yield rows
            rows = []
        rows.append(index)
    if rows:
        yield rows


def _pass(plan: Plan, part: Restoring, layers: Sequence[int], units: Sequence[Unit]) -> Tensor:
    """One pass with a unit to a row."""
    rows = torch.tensor([row for row, unit in enumerate(units) for _ in unit.positions])
    places = torch.tensor([place for unit in units for place in unit.positions])
    start = min(int(places.min()), plan.n_tokens - plan.runner.keep_logits) if plan.keys is not None else 0

    def put(layer: int) -> Change:
        return lambda value: part.put(value, layer, rows.to(value.device), places.to(value.device), start)

    first, *later = layers
    changes = {str(part.hook(layer)): put(layer) for layer in later}
    point = plan.runner.point(str(part.hook(first)))
    if point.name == plan.runner.points[first].name:
        value = value_of(plan.corrupted.values[point.name], point)[:, start:]
        hidden = put(first)(value.expand(len(units), -1, -1))
        extra = plan.corrupted.added[first]
        hidden = hidden if extra is None else hidden + extra[:, start:]
        return plan.runner.go_on(plan.corrupted, first + 1, hidden, keys=plan.keys, changes=changes)
    skipped = _known_outputs(plan, first, point, put(first), start, len(units))
    if point.module_path not in skipped:
        changes[point.name] = put(first)
    hidden = plan.corrupted.calls[first].hidden[:, start:].expand(len(units), -1, -1)
    return plan.runner.go_on(plan.corrupted, first, hidden, keys=plan.keys, changes=changes, skipped=skipped)


def _known_outputs(plan: Plan, layer: int, point: HookPoint, put: Change, start: int, rows: int) -> dict[str, Any]:
    """What modules of the first block return that come no later than the restored hook: as recorded, or restored."""
    found: dict[str, Any] = {}
    for part in ("attn_out", "mlp_out"):
        known = plan.runner.point(f"blocks.{layer}.{HOOKS[part]}")
        if known.order > point.order:
            break
        raw = plan.corrupted.values[known.name]
        value = value_of(raw, known)[:, start:].expand(rows, -1, -1)
        found[known.module_path] = with_value(raw, known, put(value) if known.name == point.name else value)
    return found


def _window(layer: int, width: int, n_layers: int) -> list[int]:
    """The layers of a window around one, those that there are.

    Example:
        >>> _window(0, 3, 6), _window(3, 1, 6), _window(3, 4, 6)
        ([0, 1], [3], [1, 2, 3, 4])
    """
    first = layer - width // 2
    return [one for one in range(first, first + width) if 0 <= one < n_layers]


def _checked(
    model: VisionLanguageModel,
    parts: Sequence[Part],
    layers: Sequence[int] | None,
    window: int,
    metric: str,
    against: Target | None,
    tokens_per_pass: int | None,
) -> list[int]:
    if not parts:
        raise ConfigError("Got no parts to restore; expected at least one.")
    numbers = check_layers(model, layers)
    if window < 1 or (tokens_per_pass is not None and tokens_per_pass < 1):
        raise ConfigError(f"Got window={window} and tokens_per_pass={tokens_per_pass}; expected 1 or more.")
    if metric not in get_args(MetricName):
        raise ConfigError(f"Got metric={metric!r}; expected one of {', '.join(get_args(MetricName))}.")
    if metric == "logit_difference" and against is None:
        raise ConfigError("Got metric='logit_difference' without another answer; give against=...")
    return numbers


def _spelt(model: VisionLanguageModel, ids: Sequence[int]) -> str:
    return str(model.tokenizer.decode(list(ids))).strip()


def _label(batch: EncodedBatch, tokens: Sequence[str], position: int) -> str:
    if int(batch.layout.modality[0, position]) in (Modality.IMAGE, Modality.NEWLINE):
        return f"picture {int(batch.layout.image_index[0, position]) + 1}, token {position}"
    return tokens[position]
