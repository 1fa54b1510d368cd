"""Curves of the page: what is drawn, read back from the SVG."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from gradeclip_ft.report import figures
from gradeclip_ft.report.content import Chart


def test_long_series_become_means_of_equal_stretches() -> None:
    """By hand: 0..9 in five stretches of two."""
    points = [(float(k), float(k * 10)) for k in range(10)]
    expected = [(0.5, 5), (2.5, 25), (4.5, 45), (6.5, 65), (8.5, 85)]
    np.testing.assert_allclose(figures.thin(points, 5), expected)


def test_values_that_are_not_finite_are_left_out() -> None:
    """Catches a whole curve that vanishes because one step was NaN."""
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, 2.0)]
    assert figures.thin(points, 10).tolist() == [[0.0, 1.0], [3.0, 2.0]]
    assert figures.curves_svg(Chart("loss", {"a": [(0.0, math.nan)]}), ("a",)) is None


def ticks(svg: str) -> list[tuple[str, float, float]]:
    """Text, x and y of every label of an axis."""
    found = re.findall(r'<text [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', svg)
    return [(text, float(x), float(y)) for x, y, text in found]


def test_a_curve_has_its_colour_and_lies_where_the_axes_say() -> None:
    """Catches swapped colours, a curve upside down, and fractions that read as numbers."""
    chart = Chart("top-1", {"b": [(0.0, 0.1), (100.0, 0.5)]}, percent=True)
    svg = figures.curves_svg(chart, ("a", "b"))
    assert svg is not None
    (line,) = re.findall(r'd="M ([^"]*)"[^>]*stroke: var\(--c1\)', svg.replace("\n", ""))
    x0, y0, x1, y1 = map(float, re.findall(r"[\d.]+", line))
    at = {text: (x, y) for text, x, y in ticks(svg)}
    assert {"0%", "50%", "0", "100", "training step"} <= set(at)
    assert (at["0"][0], at["100"][0]) == pytest.approx((x0, x1), abs=0.1)
    per_point = (at["50%"][1] - at["0%"][1]) / 50
    assert (y1 - y0) / 40 == pytest.approx(per_point, rel=1e-3)


def test_a_single_point_and_a_flat_curve_can_be_drawn() -> None:
    """Catches the division by zero of a run that was measured once."""
    for points in ([(0.0, 0.3)], [(0.0, 2.0), (9.0, 2.0)]):
        assert figures.curves_svg(Chart("x", {"a": points}, markers=True), ("a",))
