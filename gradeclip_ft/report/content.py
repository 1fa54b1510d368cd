"""Content of a report page as plain data: curves, cases and facts beside `results.table.Table`.

A method is whatever the reader switches between: models under one explainer (fine-tuning), or
explainers on one model. Its name is the key of every mapping here, and its place in `Page.methods`
decides its colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, UInt8

from gradeclip_ft.results.table import Table

Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """Curves of one quantity over training steps or another one, or a bar per method.

    Attributes:
        title: The quantity, with its unit.
        series: Points (step, value) per method; bars show the value of the only one.
        percent: Whether values are fractions, to be shown in per cent.
        markers: Whether single points are marked (few measurements, not a dense curve).
        x: What the points are over.
        errors: Per method the half height of a band around each point, or of the line on a bar.
        bars: Whether bars are drawn.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    percent: bool = False
    markers: bool = False
    x: str = "training step"
    errors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    bars: bool = False


@dataclass(frozen=True)
class Words:
    """A sentence, and how much each of its words contributes to the match with the picture.

    Attributes:
        words: In order.
        values: Per method a share for each word; they sum to 1, or are all 0.
        cut: Rest of the sentence, beyond the context of the model.
    """

    words: Sequence[str]
    values: Mapping[str, Sequence[float]]
    cut: str = ""


@dataclass(frozen=True)
class Case:
    """One image with its phrases and a heat map for every phrase and method.

    Attributes:
        image: Pixels as the reader should see them.
        phrases: Texts whose evidence the maps show.
        heat: Maps per method on any grid that covers the whole image; every map is shown on a 0-1
            scale of its own.
        caption: Sentence the phrases come from.
        source: Name of the picture.
        boxes: True places of each phrase, xyxy in [0, 1] of the image; empty where unknown.
        values: Numbers below the maps: name of the quantity, then method, then one text per phrase.
        scores: A text after each phrase, the same for all methods.
        sentences: Sentences whose words are coloured.
    """

    image: UInt8[np.ndarray, "H W 3"]
    phrases: Sequence[str]
    heat: Mapping[str, Float[np.ndarray, "P h w"]]
    caption: str = ""
    boxes: Sequence[Sequence[Box]] = ()
    values: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    source: str = ""
    scores: Sequence[str] = ()
    sentences: Sequence[Words] = ()


@dataclass(frozen=True)
class Page:
    """All of a report.

    Attributes:
        title: Heading and window title.
        intro: One paragraph.
        methods: Names of the methods, in the order of columns.
        kind: What the methods are: models, explainers.
        first: Method that is shown large at first; None for the last.
        table: Results: a label and an optional `note` per row, methods as columns of fractions.
        deltas: Whether the table shows each value's difference from the first method's.
        contrast: Two methods; a last column of the table shows the second minus the first.
        charts: Curves and bars.
        heading: Of the charts.
        cases: Pictures.
        facts: Footer: heading, then what it lists (settings, versions, hashes).
    """

    title: str
    intro: str
    methods: Sequence[str]
    kind: str = "Method"
    first: str | None = None
    table: Table | None = None
    deltas: bool = True
    contrast: tuple[str, str] | None = None
    charts: Sequence[Chart] = ()
    heading: str = "How training went"
    cases: Sequence[Case] = ()
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
