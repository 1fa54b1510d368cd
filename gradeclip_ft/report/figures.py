"""Pictures of the page: coloured maps as PNG, curves as SVG, and a still figure of the maps.

The colour map is perceptually even and grows steadily in lightness, so it reads the same without
colour vision.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import cast

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from PIL import Image

from gradeclip_ft.report.content import Box, Case, Chart, Point

COLOUR_MAP = "inferno"
# Colours of page.css, which has others for a dark screen: in curves each becomes its variable.
HUES = "#77736b", "#c96200", "#0068b5", "#00806a", "#a1478a", "#8a6d00", "#b3293f", "#4b5fc4"
SOFT, LINE = "#635f57", "#e3dfd6"
VARIABLES = {SOFT: "soft", LINE: "line"} | {hue: f"c{k}" for k, hue in enumerate(HUES)}


def scale_heat(heat: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """The map between its own minimum (0) and maximum (1); a constant map is 0 everywhere.

    A range below 1e-6 of the largest value is rounding, and counts as constant.

    Raises:
        ValueError: A value is not finite.
    """
    if not np.isfinite(heat).all():
        raise ValueError("a heat map holds NaN or infinity; expected finite relevance")
    low, high = float(heat.min()), float(heat.max())
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return np.zeros(heat.shape, dtype=np.float32)
    return ((heat - low) / (high - low)).astype(np.float32)


def enlarge(heat: Float[np.ndarray, "h w"], size: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """Bilinear to (height, width), patch centres staying where they are."""
    height, width = size
    picture = Image.fromarray(np.ascontiguousarray(heat, dtype=np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def heat_png(heat: Float[np.ndarray, "h w"], side: int = 96) -> str:
    """Data URI of the coloured map, `side` pixels long; the palette index is the value x 255."""
    factor = side / max(heat.shape)
    size = (max(1, round(heat.shape[0] * factor)), max(1, round(heat.shape[1] * factor)))
    index = np.rint(enlarge(scale_heat(heat), size) * 255).astype(np.uint8)
    picture = Image.fromarray(index).convert("P")
    picture.putpalette(colours().tobytes())
    return png(picture)


def png(picture: Image.Image) -> str:
    """Data URI of an image, lossless."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def colours() -> UInt8[np.ndarray, "256 3"]:
    """Red, green and blue of the colour map, from the least to the most relevant."""
    rgba = matplotlib.colormaps[COLOUR_MAP](np.arange(256), bytes=True)
    return np.ascontiguousarray(rgba[:, :3])


def overlay(
    image: UInt8[np.ndarray, "H W 3"], heat: Float[np.ndarray, "h w"], opacity: float = 0.6
) -> UInt8[np.ndarray, "H W 3"]:
    """The coloured map over the image, as the page shows it."""
    index = np.rint(enlarge(scale_heat(heat), image.shape[:2]) * 255).astype(np.uint8)
    mixed = (1 - opacity) * image + opacity * colours()[index]
    return cast("UInt8[np.ndarray, 'H W 3']", np.rint(mixed).astype(np.uint8))


def curves_svg(chart: Chart, methods: Sequence[str], most: int = 150) -> str | None:
    """A chart as an SVG element for the page; None when no series has a finite point.

    The place of a series in `methods` decides its colour; longer ones are thinned to `most` points.
    """
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    if chart.bars:
        _draw_bars(axes, chart, methods)
    elif not _draw_curves(axes, chart, methods, most):
        return None
    axes.tick_params(color=SOFT, labelcolor=SOFT)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    file = StringIO()
    plain = {"svg.fonttype": "none", "svg.hashsalt": "page", "font.sans-serif": ["DejaVu Sans"]}
    with matplotlib.rc_context(plain):  # type: ignore[arg-type]
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    # Without what only a file of its own needs: declarations, its style, names of its groups.
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r'<defs>\s*<style.*?</defs>| xmlns(:xlink)?="[^"]*"', "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?!m[0-9a-f]{10}")[^"]*"', "", svg)
    return re.sub("|".join(VARIABLES), lambda found: f"var(--{VARIABLES[found[0]]})", svg)


def _hue(name: str, methods: Sequence[str]) -> tuple[str, str]:
    """Colour and style of a method's line; there are fewer colours than methods may be."""
    place = list(methods).index(name)
    return HUES[place % len(HUES)], ("-", "--", ":")[place // len(HUES) % 3]


def _draw_curves(axes: Axes, chart: Chart, methods: Sequence[str], most: int) -> bool:
    """Draw all series; False where none has a finite point."""
    for name, points in chart.series.items():
        if (curve := thin(points, most)).size:
            hue, style = _hue(name, methods)
            marker = "o" if chart.markers else ""
            axes.plot(*curve.T, color=hue, ls=style, marker=marker, clip_on=False)
            if name in chart.errors:
                x, y = np.array(points).T
                error = np.array(chart.errors[name])
                axes.fill_between(x, y - error, y + error, color=hue, alpha=0.18, lw=0)
    if not axes.lines:
        return False
    low, high = axes.dataLim.intervaly
    if chart.percent or low < 0.5 * high:
        axes.set_ylim(bottom=min(low, 0.0))
    axes.margins(x=0)
    axes.set_xlim(left=0)
    axes.ticklabel_format(useOffset=False)
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(chart.x, color=SOFT)
    axes.grid(axis="y", color=LINE, clip_on=False)
    return True


def _draw_bars(axes: Axes, chart: Chart, methods: Sequence[str]) -> None:
    """A bar for each method, the first at the top."""
    names = list(chart.series)
    values = [chart.series[name][0][1] for name in names]
    errors = [chart.errors[name][0] if name in chart.errors else 0.0 for name in names]
    hues = [_hue(name, methods)[0] for name in names]
    axes.barh(names, values, xerr=errors, color=hues, ecolor=SOFT, height=0.7)
    axes.invert_yaxis()
    if chart.percent:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="x", color=LINE)
    axes.set_axisbelow(True)


def thin(points: Sequence[Point], most: int) -> Float[np.ndarray, "K 2"]:
    """The finite points; a longer series as means over `most` stretches of equal count."""
    finite = np.array(sorted(p for p in points if np.isfinite(p).all())).reshape(-1, 2)
    if len(finite) <= most:
        return finite
    return np.array([stretch.mean(0) for stretch in np.array_split(finite, most)])


def draw_maps(
    photo: UInt8[np.ndarray, "H W 3"],
    heat: Mapping[str, Float[np.ndarray, "P H W"]],
    titles: Sequence[str],
    opacity: float = 0.6,
) -> np.ndarray:
    """A figure of pyplot with every map over the photo; NaN shows the photo alone.

    Args:
        photo: Pixels.
        heat: Maps by method.
        titles: Of the columns, one per map of a method.
        opacity: Of the maps.

    Returns:
        The axes, a row per method and a column per map.
    """
    from matplotlib import pyplot  # starts what shows figures, which pages do not need

    height, width = photo.shape[:2]
    side = 2 * TILE / max(height, width)
    _, axes = pyplot.subplots(
        len(heat),
        len(titles),
        figsize=(len(titles) * width * side, len(heat) * (height * side + 0.3)),
        squeeze=False,
        layout="constrained",
    )
    for row, (method, maps) in zip(axes, heat.items(), strict=True):
        row[0].set_ylabel(method)
        for place, title, values in zip(row, titles, maps, strict=True):
            _show(place, photo, ())
            place.imshow(values, cmap=COLOUR_MAP, alpha=opacity)
            place.set_title(title.replace("$", r"\$"), fontsize=9)  # it would begin a formula
    return axes


TILE = 1.5  # inches
LETTER = 0.075  # inches that a letter of a label takes
FEW = 40  # maps; more are drawn smaller
WIDEST = 400  # phrases; matplotlib draws up to 65,536 pixels
SIDE = 288  # pixels of a tile before the figure's own scaling


def draw_still(
    cases: Sequence[Case],
    methods: Sequence[str],
    path: Path,
    *,
    columns: int | None = 6,
    each: int | None = 2,
) -> Path:
    """Write a PNG: the picture with the true box in the first row, below it every method's map.

    There are at most `columns` phrases, and at most `each` of one case; None takes them all.

    Raises:
        ValueError: The figure would be wider than a picture can be.
    """
    places = [(case, row) for case in cases for row in range(len(case.phrases))[:each]][:columns]
    rows = ["Picture", *methods]
    left = 0.25 + LETTER * max(map(len, rows))
    width, height = len(places) * TILE + left, len(rows) * TILE + 0.3
    if len(places) > WIDEST:
        raise ValueError(
            f"picture= has {len(places)} phrases side by side, at most {WIDEST} fit; give fewer "
            "images or phrases"
        )
    few = len(places) * len(methods) <= FEW
    figure = Figure(figsize=(width, height), dpi=144 if few else 96, facecolor="white")
    axes = figure.subplots(len(rows), len(places), squeeze=False)
    figure.subplots_adjust(
        left=left / width,
        right=1 - 0.04 / width,
        top=1 - 0.28 / height,
        bottom=0.04 / height,
        wspace=0.05,
        hspace=0.05,
    )
    for column, (case, row) in enumerate(places):
        picture = Image.fromarray(case.image)
        factor = SIDE / max(picture.size)
        size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
        sharp = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
        photo = np.asarray(picture.resize(size, sharp))
        boxes = case.boxes[row] if case.boxes else ()
        # A dollar would begin a formula.
        axes[0, column].set_title(case.phrases[row].replace("$", r"\$"), fontsize=9, pad=4)
        _show(axes[0, column], photo, boxes)
        for line, method in enumerate(methods, start=1):
            _show(axes[line, column], overlay(photo, case.heat[method][row]), boxes)
    for line, name in enumerate(rows):
        axes[line, 0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center", labelpad=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _show(axes: Axes, image: UInt8[np.ndarray, "H W 3"], boxes: Sequence[Box]) -> None:
    height, width = image.shape[:2]
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    for x0, y0, x1, y1 in boxes:
        corner, size = (x0 * width, y0 * height), ((x1 - x0) * width, (y1 - y0) * height)
        for colour, line, style in (("black", 2, "-"), ("white", 1, "--")):
            box = Rectangle(corner, *size, fill=False, ec=colour, lw=line, ls=style)
            axes.add_patch(box)
