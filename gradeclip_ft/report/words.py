"""A sentence with coloured words as a still picture, a line per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from gradeclip_ft.report.content import Words
from gradeclip_ft.report.figures import literal

WIDTH, LINE, MARGIN = 9.0, 0.42, 0.12  # inches
COLOUR_MAP = "Oranges"  # one hue, lightness alone says how much


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
    colour = matplotlib.colormaps[COLOUR_MAP](0.75 * share)
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
