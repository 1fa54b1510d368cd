"""One HTML file without outside references, from plain data: `render(page, path)`.

All text is escaped by the template; pictures are inline PNG, curves inline SVG. The template, its
parts, its style and its script stand beside this file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gradeclip_ft.report import figures
from gradeclip_ft.report.content import Box, Case, Page, Words

SMALL = 160  # images with a shorter long side are enlarged as visible pixels


def render(page: Page, path: Path) -> Path:
    """Writes the page, aside first and then renamed, and returns its path.

    Raises:
        ValueError: A case lacks the maps of a method, or counts of phrases, maps and boxes differ.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plots = [figures.lay_out(chart, page.methods) for chart in page.charts]
    text = environment.get_template("page.html.j2").render(
        page=page,
        plots=[plot for plot in plots if plot is not None],
        size={
            "width": figures.WIDTH,
            "height": figures.HEIGHT,
            "left": figures.LEFT,
            "right": figures.RIGHT,
            "bottom": figures.BOTTOM,
        },
        cases=[_shown(case, page.methods) for case in page.cases],
        has_boxes=any(boxes for case in page.cases for boxes in case.boxes),
        gradient=", ".join(f"rgb({r} {g} {b})" for r, g, b in figures.colours()[::15].tolist()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    return aside.replace(path)


@dataclass(frozen=True)
class _Map:
    """A heat map as the template needs it: picture, and values in per cent for reading them off."""

    uri: str
    grid: str
    values: str
    empty: bool


@dataclass(frozen=True)
class _ShownCase:
    caption: str
    source: str
    photo: str
    ratio: str
    small: bool
    phrases: Sequence[str]
    boxes: Sequence[Sequence[Box]]
    values: dict[str, dict[str, Sequence[str]]]
    scores: Sequence[str]
    sentences: Sequence[Words]
    maps: dict[str, list[_Map]]


def _shown(case: Case, methods: Sequence[str]) -> _ShownCase:
    check_case(case, methods)
    height, width = case.image.shape[:2]
    return _ShownCase(
        caption=case.caption,
        source=case.source,
        photo=figures.image_png(case.image),
        ratio=f"{width} / {height}",
        small=max(height, width) <= SMALL,
        phrases=case.phrases,
        boxes=case.boxes or [()] * len(case.phrases),
        values={name: dict(numbers) for name, numbers in case.values.items()},
        scores=case.scores,
        sentences=case.sentences,
        maps={method: [_map(heat) for heat in case.heat[method]] for method in methods},
    )


def check_case(case: Case, methods: Sequence[str]) -> None:
    """Refuses a case whose parts do not fit together.

    Raises:
        ValueError: Which part, got and expected.
    """
    expected = len(case.phrases)
    if not expected:
        raise ValueError(f"case {case.caption!r} has no phrase; leave it out")
    for method in methods:
        if method not in case.heat:
            raise ValueError(f"case {case.caption!r} has no maps of {method!r}; got {[*case.heat]}")
        if len(case.heat[method]) != expected:
            got = len(case.heat[method])
            raise ValueError(f"{method!r} has {got} maps for {expected} phrases; expected one each")
    if case.scores and len(case.scores) != expected:
        raise ValueError(f"scores for {len(case.scores)} of {expected} phrases; expected one each")
    if case.boxes and len(case.boxes) != expected:
        raise ValueError(f"boxes for {len(case.boxes)} of {expected} phrases; use () for unknown")


def _map(heat: Float[np.ndarray, "h w"]) -> _Map:
    scaled = figures.scale_heat(heat)
    return _Map(
        uri=figures.heat_png(heat),
        grid=f"{heat.shape[0]} {heat.shape[1]}",
        values=" ".join(str(value) for value in np.rint(100 * scaled).astype(int).ravel()),
        empty=not scaled.any(),
    )
