"""The maps as a still picture, for a README or a slide: a column per phrase, a row per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from gradeclip_ft.report.content import Box, Case
from gradeclip_ft.report.figures import literal, overlay

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
