"""Curves as geometry: where axes, ticks and lines of a small chart go; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gradeclip_ft.report.content import Chart, Point

WIDTH, HEIGHT = 360.0, 230.0  # of the view box; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 40.0


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in view-box units, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One method's curve: SVG path, single points, and the index of the method's colour."""

    method: str
    colour: int
    path: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Plot:
    """A laid-out chart."""

    chart: Chart
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]


def lay_out(chart: Chart, methods: Sequence[str], most: int = 150) -> Plot | None:
    """Axes and paths of a chart; None when no series has a finite point.

    Args:
        chart: The curves. Points that are not finite break nothing: they are left out.
        methods: Decides the colour of each series.
        most: Longer series are shown as means over that many equal stretches.
    """
    series = {name: thin(points, most) for name, points in chart.series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    everything = [point for points in series.values() for point in points]
    last = max(x for x, _ in everything) or 1.0
    x_values = [x for x in nice_ticks(0.0, last) if x <= last]
    low, high = min(y for _, y in everything), max(y for _, y in everything)
    y_values = nice_ticks(min(0.0, low) if chart.percent or low < 0.5 * high else low, high)

    def place(point: Point) -> Point:
        return (
            _between(point[0], (0.0, last), LEFT, WIDTH - RIGHT),
            _between(point[1], (y_values[0], y_values[-1]), HEIGHT - BOTTOM, TOP),
        )

    lines = [
        _line(name, list(methods).index(name), [place(point) for point in points])
        for name, points in series.items()
    ]
    x_ticks = [Tick(place((x, 0.0))[0], _label(x)) for x in x_values]
    y_ticks = [Tick(place((0.0, y))[1], _label(y, percent=chart.percent)) for y in y_values]
    return Plot(chart, lines, x_ticks, y_ticks)


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """The finite points; a longer series as means over `most` stretches of equal count."""
    finite = sorted(p for p in points if math.isfinite(p[0]) and math.isfinite(p[1]))
    if len(finite) <= most:
        return finite
    edges = [round(k * len(finite) / most) for k in range(most + 1)]
    stretches = [finite[a:b] for a, b in pairwise(edges)]
    return [(_mean([x for x, _ in s]), _mean([y for _, y in s])) for s in stretches]


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in equal steps, from below `low` to above `high`.

    A step is 1, 2, 2.5 or 5 times a power of ten.

    >>> nice_ticks(0, 300)
    [0.0, 100.0, 200.0, 300.0]
    """
    extent = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(extent / about))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * about >= extent)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def _line(method: str, colour: int, places: Sequence[Point]) -> Line:
    path = " ".join(f"{'M' if k == 0 else 'L'}{x:.1f} {y:.1f}" for k, (x, y) in enumerate(places))
    return Line(method, colour, path, places)


def _between(value: float, limits: Point, start: float, end: float) -> float:
    return start + (value - limits[0]) / (limits[1] - limits[0]) * (end - start)


def _label(value: float, *, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:.4g} %"
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
