"""A page of causal traces: layers by tokens, maps over the picture, and the features of the hottest cell."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image

from sae_lens_multimodal.autointerp.drawing import colours
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.report.colours import heat_rgba
from sae_lens_multimodal.report.formats import number, visible
from sae_lens_multimodal.report.single_page import SinglePage
from sae_lens_multimodal.types import Modality

if TYPE_CHECKING:
    from torch import Tensor

    from sae_lens_multimodal.hooks.trace_findings import Confirmation, MeanAblation, TraceStory
    from sae_lens_multimodal.hooks.trace_result import CausalTrace, Cell

    Item: TypeAlias = CausalTrace | TraceStory
    """A trace, or one with the features of its hot cell."""
    Pictures: TypeAlias = Image.Image | Sequence[Image.Image]
    """A prompt's picture, or all of them in order."""

PAGE = SinglePage(kind="trace", what="causal traces", schema_version=1)
CELL = 22
"""Units of a cell's side, as in the template."""
MAP_SIDE = 240
"""Pixels of the longer side of a map."""
WORTH_A_MAP = 0.02
"""The least share that image tokens must bring back for a part to get maps."""


@dataclass(frozen=True, kw_only=True)
class CellView:
    """One restoring, as a square."""

    x: int
    y: int
    colour: str
    title: str
    hot: bool
    """Whether it is the cell whose features are shown."""


@dataclass(frozen=True, kw_only=True)
class GridView:
    """One part: layers from below, tokens from the left, all of a picture's tokens as one column."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[CellView, ...]
    width: int
    height: int
    summary: str


@dataclass(frozen=True, kw_only=True)
class MapView:
    """What a layer's image tokens bring back, over the picture."""

    caption: str
    url: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True, kw_only=True)
class FeatureView:
    """One feature of the hot cell."""

    feature: int
    explanation: str
    clean: str
    corrupted: str
    restored: str
    ablated: str
    exchanged: str
    mean_ablated: str
    """"" where there were no reference prompts."""


@dataclass(frozen=True, kw_only=True)
class TraceView:
    """One trace as the page shows it."""

    title: str
    about: str
    numbers: tuple[tuple[str, str, str], ...]
    """Each metric, clean and corrupted."""
    grids: tuple[GridView, ...]
    maps: tuple[tuple[str, tuple[MapView, ...]], ...]
    """For each part that image tokens matter in, a map for each layer."""
    cell: str
    """The hot cell in words; "" without features."""
    features: tuple[FeatureView, ...]
    verdict: tuple[str, ...]
    """What restoring and ablating the features showed, in sentences."""


def build_trace_report(
    items: Mapping[str, Item],
    *,
    output: Path | str,
    pictures: Mapping[str, Pictures] | None = None,
    title: str = "Causal tracing",
) -> Path:
    """Write a folder with one page of traces, which opens in a browser from disk, and the numbers as JSON.

    Args:
        items: what `causal_trace` or `trace_features` gave, by the name that the page shows, such as the question.
        output: the folder to write; one with an earlier page of this kind is replaced.
        pictures: the picture of each prompt, or all of them in order, by the same names; without, there are no maps.
        title: of the page.

    Returns:
        The page.

    Raises:
        ConfigError: there are no traces.
        StoreError: the folder holds something else.
    """
    if not items:
        raise ConfigError("Got no traces; expected at least one.")
    shown = pictures or {}
    views = [trace_view(name, item, shown.get(name, ())) for name, item in items.items()]
    return PAGE.write(output, title=title, views=views, numbers={name: one.to_dict() for name, one in items.items()})


def trace_view(name: str, item: Item, pictures: Pictures = ()) -> TraceView:
    """Turn a trace into what the page shows."""
    from sae_lens_multimodal.hooks.trace_findings import TraceStory

    story = item if isinstance(item, TraceStory) else None
    trace = item.trace if isinstance(item, TraceStory) else item
    layers = "one layer at a time" if trace.window == 1 else f"windows of {trace.window} layers"
    against = f" against “{trace.against}”" if trace.against else ""
    return TraceView(
        title=name,
        about=(
            f"The answer is “{trace.answer}”{against}. Corrupted by {trace.corruption}. Restored: {layers}; shares are "
            f"of the {trace.metric.replace('_', ' ')}."
        ),
        numbers=tuple(
            (metric.replace("_", " "), number(trace.clean[metric]), number(trace.corrupted[metric]))
            for metric in trace.values
        ),
        grids=tuple(_grid(trace, part, story) for part in trace.parts),
        maps=_maps(trace, [pictures] if isinstance(pictures, Image.Image) else list(pictures)),
        cell="" if story is None else _cell_words(story),
        features=() if story is None else _features(story),
        verdict=() if story is None else _verdict(story),
    )


def _columns(trace: CausalTrace) -> list[tuple[str, list[int]]]:
    """Units by column: each by itself, the single tokens of a picture together."""
    found: list[tuple[str, list[int]]] = []
    last = ""
    for index, unit in enumerate(trace.units):
        place = unit.positions[0]
        kind = int(trace.layout.modality[0, place])
        in_picture = len(unit.positions) == 1 and kind in (Modality.IMAGE, Modality.NEWLINE)
        name = f"picture {int(trace.layout.image_index[0, place]) + 1}" if in_picture else visible(unit.label.strip())
        if in_picture and name == last:
            found[-1][1].append(index)
        else:
            found.append((name, [index]))
        last = name if in_picture else ""
    return found


def _grid(trace: CausalTrace, part: str, story: TraceStory | None) -> GridView:
    columns, shares = _columns(trace), trace.part(part)
    cells: list[CellView] = []
    for row, layer in enumerate(reversed(trace.layers)):
        own = shares[len(trace.layers) - 1 - row]
        for at, (name, units) in enumerate(columns):
            value = _strongest(own[units])
            hot = (
                story is not None and (story.cell.part, story.cell.layer) == (part, layer) and story.cell.unit in units
            )
            what = f"{name}, the strongest of {len(units)} tokens" if len(units) > 1 else name
            what += " (corrupted)" if all(trace.is_corrupted(unit) for unit in units) else ""
            said = f"{what}, layer {layer}: {number(value)}"
            cells.append(CellView(x=at * CELL, y=row * CELL, colour=_colour(value), title=said, hot=hot))
    best = max(trace.top(1, part=part), key=lambda one: one.restored, default=None)
    where = "nothing" if best is None else f"{number(best.restored)} at {best.label.strip()}, layer {best.layer}"
    return GridView(
        caption=_PARTS.get(part, part),
        columns=tuple(name for name, _ in columns),
        rows=tuple(str(layer) for layer in reversed(trace.layers)),
        cells=tuple(cells),
        width=CELL * len(columns),
        height=CELL * len(trace.layers),
        summary=f"{_PARTS.get(part, part)}: share restored by layer and token; at most {where}.",
    )


_PARTS = {"resid": "Residual stream", "attn_out": "Attention output", "mlp_out": "MLP output"}


def _strongest(values: Tensor) -> float:
    """The value furthest from 0."""
    known = values[~values.isnan()]
    return float(known[known.abs().argmax()]) if len(known) else float("nan")


def _colour(value: float) -> str:
    """A colour for a share; what takes the answer further away is shown apart."""
    if not np.isfinite(value):
        return "transparent"
    if value < -WORTH_A_MAP:
        return "var(--wrong)"
    red, green, blue = colours(np.array([[max(0.0, min(1.0, value))]]))[0, 0].tolist()
    return f"#{red:02x}{green:02x}{blue:02x}"


def _maps(trace: CausalTrace, pictures: Sequence[Image.Image]) -> tuple[tuple[str, tuple[MapView, ...]], ...]:
    found = []
    for part in trace.parts:
        values = np.stack([trace.by_position(part, layer).nan_to_num().numpy() for layer in trace.layers])
        for image, picture in enumerate(pictures):
            own = values[:, (trace.layout.image_index[0] == image).numpy()]
            most = float(own.max()) if own.size else 0.0
            if most < WORTH_A_MAP:
                continue
            of = f", picture {image + 1}" if len(pictures) > 1 else ""
            maps = tuple(_map(trace, part, layer, image, picture, most) for layer in trace.layers)
            found.append((f"{_PARTS.get(part, part)}{of} (brightest: {number(most)})", maps))
    return tuple(found)


def _map(trace: CausalTrace, part: str, layer: int, image: int, picture: Image.Image, most: float) -> MapView:
    veil = Image.fromarray(heat_rgba(trace.heatmap(part, layer, image=image) / most), "RGBA")
    painted = Image.alpha_composite(picture.convert("RGBA").resize(veil.size), veil).convert("RGB")
    factor = MAP_SIDE / max(painted.size)
    painted = painted.resize((round(painted.width * factor), round(painted.height * factor)), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    painted.save(buffer, "PNG", optimize=True)
    return MapView(
        caption=f"layer {layer}",
        url=f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}",
        width=painted.width,
        height=painted.height,
        alt=f"What restoring single image tokens of layer {layer} brings back, over the picture",
    )


def share(value: float) -> str:
    """Spell a share of the answer with two decimals, for a hundredth is more than it is good for.

    Example:
        >>> share(0.6149), share(-0.0001)
        ('0.61', '0.00')
    """
    text = f"{value:.2f}".replace("-", "\u2212")
    return "0.00" if text == "\u22120.00" else text


def _cell_words(story: TraceStory) -> str:
    words = (
        f"{_place(story.cell)} brings {share(story.cell.restored)} back. {story.n_active} features of the SAE at "
        f"{story.hook_name} are active there."
    )
    if story.at_corrupted:
        words += " The corruption changed this very token, so that restoring it early merely undoes the corruption."
    if story.hottest != story.cell:
        corrupted = ", a token that the corruption changed," if story.trace.is_corrupted(story.hottest.unit) else ""
        words += f" Of the whole trace {_place(story.hottest)}{corrupted} brings most back: "
        words += f"{share(story.hottest.restored)}."
    return words


def _place(cell: Cell) -> str:
    return f"{_PARTS.get(cell.part, cell.part)} of layer {cell.layer} at “{visible(cell.label.strip())}”"


def _features(story: TraceStory) -> tuple[FeatureView, ...]:
    return tuple(
        FeatureView(
            feature=one.feature,
            explanation=one.explanation or "not explained",
            clean=number(one.clean),
            corrupted=number(one.corrupted),
            restored=share(one.restored),
            ablated=share(one.ablated),
            exchanged=share(one.exchanged),
            mean_ablated="" if one.mean_ablated is None else share(one.mean_ablated),
        )
        for one in story.features
    )


def _verdict(story: TraceStory) -> tuple[str, ...]:
    return (
        f"All features of the SAE together bring {share(story.restored_all)} back; the cell itself "
        f"{share(story.cell.restored)}. What is between them lies in what the SAE does not reconstruct.",
        f"These {len(story.features)} together, in the prompts they were chosen on: {_confirmed(story.together)}",
        *(
            f"In held-out prompts ({at} of {len(story.held_out)}): {_confirmed(one)}"
            for at, one in enumerate(story.held_out, start=1)
        ),
    )


def _confirmed(found: Confirmation) -> str:
    own = (
        f"they bring {share(found.restored)} back; ablated in the clean run they take {share(found.ablated)} of the "
        f"answer away, set to what they are in the corrupted run {share(found.exchanged)}."
    )
    if found.mean_ablated is not None:
        own += f" {_at_means(found.mean_ablated)}"
    if not found.n_random:
        return f"{own} Too little else is active there to compare with."
    return (
        f"{own} {found.n_random} random sets of as many others there, with {share(found.weight_random)} of their "
        f"weight, bring {share(found.restored_random)} back and take {share(found.ablated_random)} and "
        f"{share(found.exchanged_random)} away."
    )


def _at_means(found: MeanAblation) -> str:
    random = "" if found.random is None else f", random sets {share(found.random)}"
    return (
        f"Put at their means over reference prompts they take {share(found.found)}{random}, all features of the SAE "
        f"but them {share(found.others)}, all of them {share(found.all_features)}, and the whole value at its mean, "
        f"which is the most that can be lost there, {share(found.value)}."
    )
