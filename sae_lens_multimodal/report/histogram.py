"""Histograms as geometry: from counts and edges to bars and ticks in a drawing's own units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from sae_lens_multimodal.report.formats import count, number, plural
from sae_lens_multimodal.report.view import BarView, HistogramView, TickView

Whose: TypeAlias = Literal["image", "text", "all"]

WIDTH, HEIGHT = 320.0, 110.0
_GAP = 1.5
_LEAST = 2.0
"""A bar that is not empty is at least so high."""
_FEWEST_BINS = 6
_MOST_LABELS = 5


def histogram_views(counts: Mapping[Whose, Sequence[int]], edges: Sequence[float]) -> tuple[HistogramView, ...]:
    """Draw several histograms on the same axes, so that they can be compared.

    Args:
        counts: tokens in each bin, by modality.
        edges: one more than there are bins, rising; bins are drawn equally wide whatever their edges.

    Returns:
        One drawing for each modality that has any counts; empty bins at both ends are cut off.

    Example:
        >>> view, = histogram_views({"image": [0, 10, 0, 1], "text": [0, 0, 0, 0]}, [1.0, 2.0, 4.0, 8.0, 16.0])
        >>> view.modality, len(view.bars), view.summary
        ('image', 2, '11 image tokens; most between 2 and 4, the strongest between 8 and 16.')
    """
    filled = [place for row in counts.values() for place, n in enumerate(row) if n]
    if not filled:
        return ()
    first, last = _range(min(filled), max(filled), len(edges) - 1)
    tallest = max(max(row) for row in counts.values())
    return tuple(
        _view(whose, list(row[first : last + 1]), list(edges[first : last + 2]), tallest)
        for whose, row in counts.items()
        if any(row)
    )


def _range(first: int, last: int, n_bins: int) -> tuple[int, int]:
    """Widen a range of bins to a few, so that one lonely bar is not as wide as the drawing."""
    while last - first + 1 < min(_FEWEST_BINS, n_bins):
        first, last = (first - 1, last) if first > 0 and (last - first) % 2 else (first, min(last + 1, n_bins - 1))
        if last == n_bins - 1 and first > 0 and last - first + 1 < _FEWEST_BINS:
            first -= 1
    return first, last


def _view(whose: Whose, counts: list[int], edges: list[float], tallest: int) -> HistogramView:
    top = math.log10(1 + tallest)
    step = WIDTH / len(counts)
    bars = []
    for place, n in enumerate(counts):
        if n:
            tall = round(max(_LEAST, HEIGHT * math.log10(1 + n) / top), 2)
            title = f"{number(edges[place])} to {number(edges[place + 1])}: {plural(n, 'token')}"
            x, width = round(place * step + _GAP / 2, 2), round(step - _GAP, 2)
            bars.append(BarView(x=x, y=round(HEIGHT - tall, 2), width=width, height=tall, title=title))
    return HistogramView(
        modality=whose,
        width=WIDTH,
        height=HEIGHT,
        bars=tuple(bars),
        x_ticks=_x_ticks(edges),
        y_ticks=_y_ticks(top),
        total=sum(counts),
        summary=_summary(counts, edges, whose),
    )


def _x_ticks(edges: list[float]) -> tuple[TickView, ...]:
    """Mark a few of the edges, round ones (powers of two) where there are enough."""
    places = [place for place, edge in enumerate(edges) if edge > 0 and math.log2(edge).is_integer()]
    if len(places) < 2:
        places = list(range(len(edges)))
    places = places[:: math.ceil(len(places) / _MOST_LABELS)]
    bins = len(edges) - 1
    return tuple(TickView(position=round(WIDTH * place / bins, 2), label=number(edges[place])) for place in places)


def _y_ticks(top: float) -> tuple[TickView, ...]:
    """Mark powers of ten, at most four."""
    powers = range(math.floor(top + 1e-9) + 1)
    step = max(1, math.ceil(len(powers) / 4))
    heights = [(power, HEIGHT * (1 - math.log10(1 + 10**power) / top)) for power in powers[::step]]
    return tuple(TickView(position=round(y, 2), label=count(10**power)) for power, y in heights if y >= -0.5)


def _summary(counts: list[int], edges: list[float], whose: Whose) -> str:
    """Say in words what the drawing shows."""
    most = max(range(len(counts)), key=lambda place: counts[place])
    last = max(place for place, n in enumerate(counts) if n)
    noun = "token" if whose == "all" else f"{whose} token"
    return (
        f"{plural(sum(counts), noun)}; most between {number(edges[most])} and {number(edges[most + 1])}, "
        f"the strongest between {number(edges[last])} and {number(edges[last + 1])}."
    )
