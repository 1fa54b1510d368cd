"""Heat maps as pictures, and curves read back from the SVG: all can be worked out by hand."""

from __future__ import annotations

import base64
import math
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from gradeclip_ft.report import figures
from gradeclip_ft.report.content import Case, Chart
from gradeclip_ft.report.figures import draw_still


def decode(uri: str) -> Image.Image:
    head, data = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return Image.open(BytesIO(base64.b64decode(data)))


def test_a_map_fills_its_own_scale_whatever_its_unit() -> None:
    """Catches maps of weak models drawn dark, or negative relevance drawn as bright."""
    heat = np.array([[-2.0, 0.0], [2.0, 6.0]], dtype=np.float32)
    np.testing.assert_allclose(figures.scale_heat(heat), [[0.0, 0.25], [0.5, 1.0]])
    tiny = figures.scale_heat(1e-12 * heat)
    np.testing.assert_allclose(tiny, figures.scale_heat(heat), rtol=1e-5)
    with pytest.raises(ValueError, match="NaN"):
        figures.scale_heat(np.array([[0.0, np.nan]], dtype=np.float32))


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_constant_map_is_drawn_as_nothing(value: float) -> None:
    """Catches rounding noise of an all-zero map blown up to full contrast."""
    assert not figures.scale_heat(np.full((3, 3), value, dtype=np.float32)).any()


def test_enlarging_equals_torch_s_bilinear_interpolation() -> None:
    """Torch is the oracle: a shift by half a pixel would move every map off its object."""
    heat = np.random.default_rng(0).random((4, 6), dtype=np.float32)
    scaled = torch.from_numpy(figures.scale_heat(heat))[None, None]
    expected = interpolate(scaled, size=(32, 48), mode="bilinear", align_corners=False)[0, 0]
    got = figures.enlarge(figures.scale_heat(heat), (32, 48))
    # PIL's bilinear filter renormalises at the border in the same way; only rounding differs.
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_png_keeps_place_and_value() -> None:
    """Catches transposed or flipped maps: the hot patch of a 2 x 3 grid is the lower left one."""
    heat = np.array([[0, 0, 0], [5, 0, 0]], dtype=np.float32)
    picture = decode(figures.heat_png(heat, side=96))
    assert picture.size == (96, 64)
    index = np.asarray(picture)
    assert index[63, 0] == 255
    assert index[0, 95] == 0
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB"))[63, 0], figures.colours()[255])


def test_an_overlay_mixes_by_its_opacity() -> None:
    """By hand: a constant map is the darkest colour, so grey 200 at opacity 0.6 becomes 80."""
    image = np.full((8, 8, 3), 200, dtype=np.uint8)
    mixed = figures.overlay(image, np.zeros((2, 2), dtype=np.float32), opacity=0.6)
    expected = np.rint(0.4 * 200 + 0.6 * figures.colours()[0])
    np.testing.assert_array_equal(mixed[3, 3], expected)


def test_the_still_picture_has_a_row_per_method_and_a_column_per_phrase(
    tmp_path: Path,
) -> None:
    """Catches phrases dropped or maps of one method shown for all: the hot corner moves."""
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    corner = {name: np.zeros((2, 2, 2), dtype=np.float32) for name in ("a", "b")}
    corner["a"][:, 0, 0] = 1
    corner["b"][:, 1, 1] = 1
    case = Case(image, ("one", "two"), corner, boxes=[[(0.0, 0.0, 0.5, 0.5)], ()])
    path = draw_still([case], ("a", "b"), tmp_path / "new" / "still.png")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)
    more = draw_still([case] * 5, ("a", "b"), tmp_path / "all.png", columns=None, each=None)
    with Image.open(more) as picture:
        assert picture.width == int((0.775 + 10 * 1.5) * 144)
    left = round(1.0 / 4.0 * pixels.shape[1])  # margin of 1 inch beside two tiles of 1.5
    tiles = np.array_split(pixels[round(0.28 / 4.8 * len(pixels)) :, left:], 3, axis=0)
    for tile, hot in ((tiles[1], (0.1, 0.3)), (tiles[2], (0.8, 0.45))):
        row, column = int(hot[0] * tile.shape[0]), int(hot[1] * tile.shape[1])
        cold = tile[int((0.9 - hot[0]) * tile.shape[0]), 40]
        assert tile[row, column if hot[0] > 0.5 else 40] > cold + 60


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


def test_a_curve_has_its_colour_and_lies_where_the_axes_say() -> None:
    """Catches swapped colours, a curve upside down, and fractions that read as numbers."""
    chart = Chart("top-1", {"b": [(0.0, 0.1), (100.0, 0.5)]}, percent=True)
    svg = figures.curves_svg(chart, ("a", "b"))
    assert svg is not None
    (line,) = re.findall(r'd="M ([^"]*)"[^>]*stroke: var\(--c1\)', svg.replace("\n", ""))
    x0, y0, x1, y1 = map(float, re.findall(r"[\d.]+", line))
    labels = re.findall(r'<text [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', svg)
    at = {text: (float(x), float(y)) for x, y, text in labels}
    assert {"0%", "50%", "0", "100", "training step"} <= set(at)
    assert (at["0"][0], at["100"][0]) == pytest.approx((x0, x1), abs=0.1)
    per_point = (at["50%"][1] - at["0%"][1]) / 50
    assert (y1 - y0) / 40 == pytest.approx(per_point, rel=1e-3)


def test_a_single_point_and_a_flat_curve_can_be_drawn() -> None:
    """Catches the division by zero of a run that was measured once."""
    for points in ([(0.0, 0.3)], [(0.0, 2.0), (9.0, 2.0)]):
        assert figures.curves_svg(Chart("x", {"a": points}, markers=True), ("a",))
