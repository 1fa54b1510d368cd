"""A user study as pages: forward simulation of a model with and without its maps.

A participant sees a picture with two captions and says which of them the model prefers (Grad-ECLIP,
journal version, IV-B3): first a set without maps, then one with the map of each caption. Examples
with their scores come before each set. Two pages exchange the pictures of the sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from gradeclip_ft.report.figures import overlay, png
from gradeclip_ft.report.page import write_template


@dataclass(frozen=True)
class Question:
    """A picture with two captions.

    Attributes:
        name: Of the picture, in the answers.
        photo: Data URI.
        captions: The choices.
        maps: Data URI of the picture under the map of each caption.
        scores: Cosine of each caption.
    """

    name: str
    photo: str
    captions: tuple[str, str]
    maps: tuple[str, str]
    scores: tuple[float, float]


def question(
    name: str,
    image: UInt8[np.ndarray, "H W 3"],
    captions: tuple[str, str],
    heat: Float[np.ndarray, "2 h w"],
    scores: tuple[float, float],
) -> Question:
    """A picture and the maps of both captions as the pages show them."""
    first, second = (png(Image.fromarray(overlay(image, each))) for each in heat)
    return Question(name, png(Image.fromarray(image)), captions, (first, second), scores)


def write_study(
    questions: Sequence[Question], examples: Sequence[Question], folder: Path
) -> list[Path]:
    """Write a.html and b.html; the pictures that one shows with maps the other shows without.

    Raises:
        ValueError: There are fewer than two questions.
    """
    if len(questions) < 2:
        raise ValueError(f"{len(questions)} question; a study needs one in each of its two sets")
    half = len(questions) // 2
    sets = {"a": (questions[:half], questions[half:]), "b": (questions[half:], questions[:half])}
    paths = []
    for version, (without, shown) in sets.items():
        path = folder / f"{version}.html"
        content = {
            "version": version,
            "examples": [asdict(each) for each in examples],
            "sets": [[asdict(each) for each in some] for some in (without, shown)],
        }
        paths.append(write_template("study.html.j2", path, content=content))
    return paths
