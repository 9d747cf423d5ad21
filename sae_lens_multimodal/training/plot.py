"""Line charts as small static SVG files, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

Points = Sequence[tuple[float, float]]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333", "#999933")
_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 30, 44
_LEGEND_ROW = 16


def line_charts(charts: Mapping[str, Mapping[str, Points]], *, x_label: str = "") -> str:
    """Draw charts one below another.

    Args:
        charts: by title, and by the name of each line, its points; values that are not finite are left out.
        x_label: what runs along the bottom.

    Returns:
        An SVG document.

    Example:
        >>> line_charts({"loss": {"image": [(0, 2.0), (1, 1.0)]}}).startswith("<svg")
        True
    """
    parts, top = [], 0.0
    for title, lines in charts.items():
        drawn = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in lines.items()}
        drawn = {name: points for name, points in drawn.items() if points}
        if not drawn:
            continue
        height = _HEIGHT + _LEGEND_ROW * math.ceil(len(drawn) / 3)
        parts.append(f'<g transform="translate(0 {top:g})">{_chart(title, drawn, x_label)}</g>')
        top += height
    style = "font-family:sans-serif;font-size:11px"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {max(top, 1):g}" width="{_WIDTH}" '
        f'height="{max(top, 1):g}" style="{style}">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>'
    )


def _chart(title: str, lines: Mapping[str, Points], x_label: str) -> str:
    every = [point for points in lines.values() for point in points]
    x_low, x_high = _span([x for x, _ in every])
    y_low, y_high = _span([y for _, y in every])
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def across(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT)

    def down(y: float) -> float:
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - _TOP)

    drawn = [f'<text x="{_LEFT}" y="18" font-weight="bold">{escape(title)}</text>']
    for value in ticks(y_low, y_high):
        y = down(value)
        drawn.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in ticks(x_low, x_high):
        x = across(value)
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="#888"/>')
        drawn.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_number(value)}</text>')
    drawn.append(f'<text x="{(_LEFT + right) / 2:.0f}" y="{bottom + 32}" text-anchor="middle">{escape(x_label)}</text>')
    for index, (name, points) in enumerate(lines.items()):
        drawn.append(_line(index, name, [(across(x), down(y)) for x, y in points]))
    return "".join(drawn)


def _line(index: int, name: str, points: Points) -> str:
    colour = _COLOURS[index % len(_COLOURS)]
    x, y = _LEFT + index % 3 * 130, _HEIGHT + 4 + _LEGEND_ROW * (index // 3)
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    dots = "".join(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.2" fill="{colour}"/>' for px, py in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        f"{dots if len(points) <= 40 else ''}"
        f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
        f'<text x="{x + 14}" y="{y}">{escape(name)}</text>'
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    return low, high


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two values, about `count` of them.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _number(value: float) -> str:
    for size, mark in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{mark}"
    return f"{value:g}"
