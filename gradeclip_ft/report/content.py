"""What stands on a report page, as plain data: tables, curves, cases and facts.

A method is whatever the reader switches between: models under one explainer (fine-tuning), or
explainers on one model. Its name is the key of every mapping here, and its place in `Page.methods`
decides its colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, UInt8

Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One line of a results table.

    Attributes:
        label: What is measured.
        values: Fraction per method; None where a method was not measured.
        note: Small print behind the label.
    """

    label: str
    values: Mapping[str, float | None]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Results as fractions, higher is better; shown in per cent.

    Attributes:
        title: Heading.
        rows: Lines, top to bottom.
        caption: How it was measured.
        contrast: Two methods; a last column shows the second minus the first.
    """

    title: str
    rows: Sequence[Row]
    caption: str = ""
    contrast: tuple[str, str] | None = None


@dataclass(frozen=True)
class Chart:
    """Curves of one quantity over training steps.

    Attributes:
        title: The quantity, with its unit.
        series: Points (step, value) per method.
        percent: Whether values are fractions, to be shown in per cent.
        markers: Whether single points are marked (few measurements, not a dense curve).
        note: Small print below.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    percent: bool = False
    markers: bool = False
    note: str = ""


@dataclass(frozen=True)
class Words:
    """A sentence, and how much each of its words says for the picture.

    Attributes:
        words: In order.
        values: Per method a share for each word; they sum to 1, or are all 0.
        cut: Rest of the sentence that the model cannot read.
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
        scores: What stands behind each phrase, whatever the method.
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
        tables: Results.
        charts: Curves.
        cases: Pictures.
        facts: Footer: heading, then what it lists (settings, versions, hashes).
    """

    title: str
    intro: str
    methods: Sequence[str]
    kind: str = "Method"
    first: str | None = None
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    cases: Sequence[Case] = ()
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
