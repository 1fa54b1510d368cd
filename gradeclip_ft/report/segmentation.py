"""Predicted classes beside the true ones, pixel by pixel, on one page, from plain data."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from gradeclip_ft.report.figures import png
from gradeclip_ft.report.page import write_template

BACKGROUND = "background"
DARK, PALE = (60, 58, 54), (242, 239, 232)  # background, and pixels that do not count
GOLDEN = 0.618034  # turns of the hue from one class to the next: neighbours differ most
LEVELS = ((0.62, 0.75), (0.4, 0.85), (0.8, 0.65), (0.5, 0.4))  # lightness and saturation
SIDE = 320  # pixels of the longer side of a shown picture, at most
CONFUSIONS = 8  # per method
LEAST = 0.03  # of a map: what a class must cover to be in the legend


@dataclass(frozen=True)
class Segmented:
    """One picture.

    Attributes:
        name: Of its file.
        photo: Its pixels.
        truth: True class of each pixel; numbers beyond the classes do not count.
        labels: Predicted classes by method.
    """

    name: str
    photo: UInt8[np.ndarray, "H W 3"]
    truth: UInt8[np.ndarray, "H W"]
    labels: Mapping[str, UInt8[np.ndarray, "H W"]]


def palette(classes: Sequence[str], first: Sequence[int]) -> UInt8[np.ndarray, "256 3"]:
    """A colour for each class, the most different ones for those that come `first`."""
    colours = np.full((256, 3), PALE, np.uint8)
    order = dict.fromkeys([*first, *range(len(classes))])
    for row, label in enumerate(order):
        light, full = LEVELS[row % len(LEVELS)]
        rgb = colorsys.hls_to_rgb(row * GOLDEN % 1, light, full)
        colours[label] = [round(255 * part) for part in rgb]
    if classes[0] == BACKGROUND:
        colours[0] = DARK
    return colours


def shrunk(picture: Image.Image, how: Image.Resampling) -> Image.Image:
    """At most `SIDE` pixels long."""
    factor = min(1.0, SIDE / max(picture.size))
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), how)


def write_segmented(
    shown: Sequence[Segmented],
    classes: Sequence[str],
    means: Mapping[str, Mapping[str, float]],
    by_class: Mapping[str, Mapping[str, Mapping[str, Any]]],
    confused: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    *,
    facts: Mapping[str, Mapping[str, str]],
) -> Path:
    """Write the page, and return its path.

    Args:
        shown: Pictures in their order.
        classes: Names in order of the labels.
        means: Numbers of each method, fractions by name.
        by_class: For each method and class its IoU (None without one) and true pixels.
        confused: For each method pairs `is`, `taken for` and their `pixels`.
        path: Of the page.
        facts: Footer: heading, then what it lists.
    """
    # Classes that are seen have the clearest colours: those of the truth, the largest first.
    seen = np.zeros(256, dtype=np.int64)
    for one in shown:
        seen += np.bincount(one.truth.ravel(), minlength=256)
    order = np.argsort(-seen[: len(classes)], kind="stable").tolist()
    colours = palette(classes, order)
    hues = [f"rgb({r} {g} {b})" for r, g, b in colours[: len(classes)].tolist()]

    def painted(labels: UInt8[np.ndarray, "H W"]) -> str:
        return png(shrunk(Image.fromarray(colours[labels]), Image.Resampling.NEAREST))

    cases = []
    for one in shown:
        shares = np.stack([_shares(labels) for labels in one.labels.values()]).max(0)
        true = [n for n in range(len(classes)) if (one.truth == n).any()]
        said = [n for n in range(len(classes)) if n not in true and shares[n] >= LEAST]
        photo = Image.fromarray(one.photo)
        height, width = one.truth.shape
        cases.append(
            {
                "name": one.name,
                "photo": png(shrunk(photo, Image.Resampling.LANCZOS)),
                "small": max(height, width) <= SIDE // 2,
                "maps": {"Truth": painted(one.truth)}
                | {name: painted(labels) for name, labels in one.labels.items()},
                "legend": {
                    "In the truth": [(classes[n], hues[n]) for n in true],
                    "Said instead": [(classes[n], hues[n]) for n in said],
                },
            }
        )
    first = next(iter(by_class.values()))
    total = sum(each["pixels"] for each in first.values()) or 1
    rows = [
        {
            "name": name,
            "hue": hues[row],
            "share": 100 * first[name]["pixels"] / total,
            "values": {method: numbers[name]["IoU"] for method, numbers in by_class.items()},
        }
        for row, name in enumerate(classes)
    ]
    rows.sort(key=lambda row: -row["share"])
    return write_template(
        "segmentation.html.j2",
        path,
        cases=cases,
        means=means,
        rows=rows,
        confused={name: list(pairs)[:CONFUSIONS] for name, pairs in confused.items()},
        total=total,
        facts=facts,
    )


def _shares(labels: UInt8[np.ndarray, "H W"]) -> np.ndarray:
    """Share of the picture that each class covers."""
    return np.bincount(labels.ravel(), minlength=256) / labels.size
