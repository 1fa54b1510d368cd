"""Pictures with boxes, and one page of them, from plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from gradeclip_ft.report.content import Box
from gradeclip_ft.report.figures import HUES, png
from gradeclip_ft.report.page import write_template

LEAST_SIDE = 320  # smaller pictures are enlarged before boxes are drawn


@dataclass(frozen=True)
class FoundBox:
    """A thing found: its name, its score from 0 to 1, and its place, xyxy in pixels."""

    name: str
    score: float
    box: Box


@dataclass(frozen=True)
class Found:
    """One picture and what was found in it, best first.

    Attributes:
        name: Of the picture.
        image: Its pixels.
        boxes: What was found.
    """

    name: str
    image: UInt8[np.ndarray, "H W 3"]
    boxes: Sequence[FoundBox]

    @property
    def names(self) -> dict[str, list[float]]:
        """Scores of each name, best first."""
        scores: dict[str, list[float]] = {}
        for box in self.boxes:
            scores.setdefault(box.name, []).append(box.score)
        return scores

    @property
    def hues(self) -> dict[str, str]:
        """A colour for each name."""
        return {name: HUES[1:][row % len(HUES[1:])] for row, name in enumerate(self.names)}


def draw(found: Found) -> Image.Image:
    """The picture with its boxes, names and scores; weak ones below strong ones."""
    picture = Image.fromarray(found.image)
    factor = max(1, -(-LEAST_SIDE // max(picture.size)))
    picture = picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )
    pen = ImageDraw.Draw(picture)
    line = max(2, max(picture.size) // 300)
    font = ImageFont.load_default(size=max(11, max(picture.size) // 45))
    for box in reversed(found.boxes):
        x0, y0, x1, y1 = (value * factor for value in box.box)
        hue, text = found.hues[box.name], f"{box.name} {box.score:.2f}"
        pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=hue, width=line)
        right, bottom = pen.textbbox((0, 0), text, font=font)[2:]
        at = (min(x0, picture.width - right - 4), max(0.0, y0 - bottom - 4))
        pen.rectangle((*at, at[0] + right + 4, at[1] + bottom + 4), fill=hue)
        pen.text((at[0] + 2, at[1] + 2), text, fill="white", font=font)
    return picture


def write_found(found: Sequence[Found], path: Path, facts: Mapping[str, Mapping[str, str]]) -> Path:
    """Write the page of all pictures, and return its path.

    Args:
        found: Pictures in their order.
        path: Of the page.
        facts: Footer: heading, then what it lists.
    """
    drawn = [(each, png(draw(each))) for each in found]
    return write_template("detections.html.j2", path, found=drawn, facts=facts)
