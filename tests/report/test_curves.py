"""Geometry of the charts against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from gradeclip_ft.report import figures
from gradeclip_ft.report.content import Chart


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 300.0, [0, 100, 200, 300]),
        (2.3, 4.4, [2, 2.5, 3, 3.5, 4, 4.5]),
        (0.0, 0.67, [0, 0.2, 0.4, 0.6, 0.8]),
        (-3.0, 3.0, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(
    low: float, high: float, expected: list[float]
) -> None:
    assert figures.nice_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 1.0, -7.5, 1e-9, 3e8])
def test_ticks_exist_for_a_single_value(value: float) -> None:
    """Catches the division by zero of a flat curve."""
    ticks = figures.nice_ticks(value, value)
    assert ticks[0] <= value < ticks[-1]


def test_long_series_become_means_of_equal_stretches() -> None:
    """By hand: 0..9 in five stretches of two."""
    points = [(float(k), float(k * 10)) for k in range(10)]
    assert figures.thin(points, 5) == [(0.5, 5), (2.5, 25), (4.5, 45), (6.5, 65), (8.5, 85)]


def test_values_that_are_not_finite_are_left_out() -> None:
    """Catches a whole curve that vanishes because one step was NaN."""
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, 2.0)]
    assert figures.thin(points, 10) == [(0.0, 1.0), (3.0, 2.0)]


def test_points_land_where_the_axes_say() -> None:
    """By hand: the highest value at the top, the first step at the left, the last at the right."""
    chart = Chart("loss", {"b": [(0.0, 0.0), (100.0, 4.0)]})
    plot = figures.lay_out(chart, ("a", "b"))
    assert plot is not None
    (line,) = plot.lines
    assert line.colour == 1
    assert line.points[0] == (figures.LEFT, figures.HEIGHT - figures.BOTTOM)
    assert line.points[1] == (figures.WIDTH - figures.RIGHT, figures.TOP)
    assert plot.y_ticks[0].label == "0"
    assert plot.x_ticks[-1].label == "100"


def test_the_last_step_reaches_the_right_edge() -> None:
    """Catches a quarter of the chart left empty because the next round tick lies far away."""
    plot = figures.lay_out(Chart("loss", {"a": [(0.0, 1.0), (310.0, 2.0)]}), ("a",))
    assert plot is not None
    assert plot.lines[0].points[-1][0] == pytest.approx(figures.WIDTH - figures.RIGHT)
    assert [tick.label for tick in plot.x_ticks] == ["0", "100", "200", "300"]


def test_fractions_are_labelled_in_per_cent() -> None:
    chart = Chart("top-1", {"a": [(0.0, 0.1), (5.0, 0.5)]}, percent=True)
    plot = figures.lay_out(chart, ("a",))
    assert plot is not None
    assert [tick.label for tick in plot.y_ticks] == ["0 %", "10 %", "20 %", "30 %", "40 %", "50 %"]


def test_a_chart_without_points_is_none() -> None:
    assert figures.lay_out(Chart("loss", {"a": [(0.0, math.nan)]}), ("a",)) is None
