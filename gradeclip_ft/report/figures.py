"""Heat maps as pictures: 0-1 scale, colour map, overlay, PNG for the page.

The colour map is perceptually even and grows steadily in lightness, so it reads the same without
colour vision.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import cast

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from gradeclip_ft.report.content import Box, Case, Chart, Point, Words

COLOUR_MAP = "inferno"


def scale_heat(heat: Float[np.ndarray, "h w"], eps: float = 1e-6) -> Float[np.ndarray, "h w"]:
    """The map between its own minimum (0) and maximum (1); a constant map is 0 everywhere.

    Args:
        heat: Any scale.
        eps: Maps whose range is smaller, as a share of their largest value, count as constant.

    Raises:
        ValueError: A value is not finite.
    """
    if not np.isfinite(heat).all():
        raise ValueError("a heat map holds NaN or infinity; expected finite relevance")
    low, high = float(heat.min()), float(heat.max())
    if high - low <= eps * max(abs(low), abs(high)):
        return np.zeros(heat.shape, dtype=np.float32)
    return ((heat - low) / (high - low)).astype(np.float32)


def enlarge(heat: Float[np.ndarray, "h w"], size: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """Bilinear to (height, width), patch centres staying where they are."""
    height, width = size
    picture = Image.fromarray(np.ascontiguousarray(heat, dtype=np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def heat_png(heat: Float[np.ndarray, "h w"], side: int = 96) -> str:
    """Data URI of the coloured map; the palette index is the value times 255.

    Args:
        heat: Any scale.
        side: Pixels of the longer side.
    """
    factor = side / max(heat.shape)
    size = (max(1, round(heat.shape[0] * factor)), max(1, round(heat.shape[1] * factor)))
    index = np.rint(enlarge(scale_heat(heat), size) * 255).astype(np.uint8)
    picture = Image.fromarray(index).convert("P")
    picture.putpalette(colours().tobytes())
    return _data_uri(picture)


def image_png(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """Data URI of an image, lossless."""
    return _data_uri(Image.fromarray(image))


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


def literal(text: str) -> str:
    """A text for a figure, without matplotlib's own meaning of a dollar."""
    return text.replace("$", r"\$")


def _data_uri(picture: Image.Image) -> str:
    buffer = BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


TILE = 1.5  # inches
LETTER = 0.075  # inches that a letter of a label takes
FEW = 40  # maps; more are drawn smaller
SIDE = 288  # pixels of a tile before the figure's own scaling


def draw_still(
    cases: Sequence[Case], methods: Sequence[str], path: Path, *, columns: int = 6, each: int = 2
) -> Path:
    """Writes a PNG: the picture with the true box in the first row, below it every method's map.

    Args:
        cases: Pictures, in order.
        methods: Rows below the picture.
        path: Where to.
        columns: Phrases at most.
        each: Phrases of one case at most.

    Raises:
        ValueError: There is no phrase to draw.
    """
    places = [(case, row) for case in cases for row in range(len(case.phrases))[:each]][:columns]
    if not places:
        raise ValueError("no phrase to draw; give at least one case")
    left = 0.25 + LETTER * max(map(len, ["Picture", *methods]))
    width, height = len(places) * TILE + left, (1 + len(methods)) * TILE + 0.3
    few = len(places) * len(methods) <= FEW
    figure = Figure(figsize=(width, height), dpi=144 if few else 96, facecolor="white")
    axes = figure.subplots(
        1 + len(methods),
        len(places),
        squeeze=False,
        gridspec_kw={
            "left": left / width,
            "right": 1 - 0.04 / width,
            "top": 1 - 0.28 / height,
            "bottom": 0.04 / height,
            "wspace": 0.05,
            "hspace": 0.05,
        },
    )
    for column, (case, row) in enumerate(places):
        photo = _enlarged(case.image)
        boxes = case.boxes[row] if case.boxes else ()
        _show(axes[0, column], photo, boxes)
        axes[0, column].set_title(literal(case.phrases[row]), fontsize=9, pad=4)
        for line, method in enumerate(methods, start=1):
            _show(axes[line, column], overlay(photo, case.heat[method][row]), boxes)
    for line, name in enumerate(["Picture", *methods]):
        axes[line, 0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center", labelpad=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _enlarged(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """The long side at `SIDE` pixels, small pictures with visible pixels."""
    picture = Image.fromarray(image)
    factor = SIDE / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    how = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return np.asarray(picture.resize(size, how))


def _show(axes: Axes, image: UInt8[np.ndarray, "H W 3"], boxes: Sequence[Box]) -> None:
    height, width = image.shape[:2]
    axes.imshow(image)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    for x0, y0, x1, y1 in boxes:
        corner, size = (x0 * width, y0 * height), ((x1 - x0) * width, (y1 - y0) * height)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="black", linewidth=2))
        axes.add_patch(
            Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=1, linestyle="--")
        )


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


WIDTH, LINE, MARGIN = 9.0, 0.42, 0.12  # inches
WORD_COLOUR_MAP = "Oranges"  # one hue, lightness alone says how much


def draw_words(sentence: Words, path: Path) -> Path:
    """Writes a PNG: the words of a sentence, the more relevant the deeper, by every method.

    Args:
        sentence: At least one word and one method.
        path: Where to.
    """
    figure = Figure(figsize=(WIDTH, 1.0), dpi=144, facecolor="white")
    label = max(_width(figure, name) for name in sentence.values) + 3 * MARGIN
    rows = {
        name: _lines(figure, sentence.words, WIDTH - label - MARGIN) for name in sentence.values
    }
    height = LINE * sum(map(len, rows.values())) + 2 * MARGIN
    figure.set_size_inches(WIDTH, height)
    top = height - MARGIN - LINE / 2
    for name, lines in rows.items():
        figure.text(MARGIN / WIDTH, top / height, name, fontsize=9, va="center", weight="bold")
        values = sentence.values[name]
        most = max(values)
        for line in lines:
            left = label
            for index in line:
                share = values[index] / most if most > 0 else 0.0
                _word(figure, sentence.words[index], share, left / WIDTH, top / height)
                left += _width(figure, sentence.words[index]) + MARGIN
            top -= LINE
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _word(figure: Figure, word: str, share: float, x: float, y: float) -> None:
    colour = matplotlib.colormaps[WORD_COLOUR_MAP](0.75 * share)
    box = {"boxstyle": "round,pad=0.25", "facecolor": colour, "edgecolor": "none"}
    figure.text(x, y, literal(word), fontsize=11, va="center", bbox=box)


def _lines(figure: Figure, words: Sequence[str], room: float) -> list[list[int]]:
    """Indices of the words of each line."""
    lines: list[list[int]] = [[]]
    left = 0.0
    for index, word in enumerate(words):
        width = _width(figure, word) + MARGIN
        if lines[-1] and left + width > room:
            lines.append([])
            left = 0.0
        lines[-1].append(index)
        left += width
    return lines


def _width(figure: Figure, word: str) -> float:
    """Inches that a word takes."""
    text = Text(0, 0, literal(word), fontsize=11, figure=figure)
    return float(text.get_window_extent().width) / figure.dpi + MARGIN / 2
