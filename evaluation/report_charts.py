"""Line charts as inline SVG: curves of training and histograms, in the colours of the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Drawn at about its natural size on a phone and on a desk, so that text stays readable on both.
_WIDTH, _HEIGHT = 380, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 40
_MAX_POINTS = 400
_FLOOR = 1e-12


@dataclass(frozen=True)
class Line:
    """A series: its name in the legend, and points (x, y), finite, x ascending."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, *, log_y: bool = False) -> str:
    """An SVG with axes, ticks, one path for each series and a legend above.

    Args:
        lines: at most six are told apart by colour; on a log axis values of 0 and below are left out.
        x_label: with its unit.
        y_label: with its unit.
        log_y: decades on the y axis.

    Returns:
        HTML of legend and SVG; "" where no series has a point.
    """
    shown = [
        Line(line.name, _thinned([(x, y) for x, y in line.points if not log_y or y > _FLOOR]))
        for line in lines
        if any(not log_y or y > _FLOOR for _, y in line.points)
    ]
    if not shown:
        return ""
    xs = [x for line in shown for x, _ in line.points]
    ys = [math.log10(y) if log_y else y for line in shown for _, y in line.points]
    x_ticks = _ticks(min(xs), max(xs))
    y_ticks = _decades(min(ys), max(ys)) if log_y else _ticks(min(ys), max(ys))
    x_low, x_high = min(*xs, x_ticks[0]), max(*xs, x_ticks[-1])
    y_low, y_high = min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x_px(value: float) -> float:
        return _LEFT + (value - x_low) / (x_high - x_low) * (right - _LEFT)

    def y_px(value: float) -> float:
        return bottom - (value - y_low) / (y_high - y_low) * (bottom - _TOP)

    parts = []
    for tick in y_ticks:
        at = y_px(tick)
        label = _power(tick) if log_y else _short(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        at = x_px(tick)
        anchor = "end" if at > right - 14 else "middle"
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="{anchor}">{_short(tick)}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    for number, line in enumerate(shown):
        places = [(x_px(x), y_px(math.log10(y) if log_y else y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="series s{number}" points="{path}"/>')
        if len(places) <= 12:  # few points are measurements, not a curve
            parts += [f'<circle class="dot s{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places]
    names = "".join(f'<span class="key s{n}">{escape(line.name)}</span>' for n, line in enumerate(shown))
    legend = f'<div class="legend"><span class="unit">{escape(y_label)}</span>{names}</div>'
    label = escape(f"{y_label} over {x_label}: {', '.join(line.name for line in shown)}", quote=True)
    return (
        f'{legend}<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MAX_POINTS`: means of neighbours, so that a long noisy curve keeps its level."""
    block = -(-len(points) // _MAX_POINTS)
    if block <= 1:
        return list(points)
    groups = [points[start : start + block] for start in range(0, len(points), block)]
    return [(group[-1][0], math.fsum(y for _, y in group) / len(group)) for group in groups]


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers around a range."""
    span = high - low
    size = max(abs(low), abs(high))
    if span <= size * 1e-9 + _FLOOR:  # one value, as far as anybody can see
        span = size if size > _FLOOR else 1.0
        low, high = low - span / 2, high + span / 2
        span = high - low
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(low), math.ceil(high)
    last = max(last, first + 1)
    step = max(1, -(-(last - first) // 5))
    return [float(power) for power in range(first, last + step, step)]


def _power(exponent: float) -> str:
    if -3 <= exponent <= 4:
        return f"{10**exponent:g}"
    return f'10<tspan dy="-4" class="up">{exponent:.0f}</tspan>'


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.10g}"
