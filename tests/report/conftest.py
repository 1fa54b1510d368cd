"""A small page whose maps are known: each phrase is hot in a patch of its own."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from gradeclip_ft.report.content import Case, Chart, Page
from gradeclip_ft.results.table import Row, Table

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
METHODS = ("Untouched", "Ordinary", "Grad-ECLIP")
HOSTILE = "<script>alert('x')</script> & \"quotes\""


def one_hot(row: int, column: int) -> np.ndarray:
    heat = np.zeros((4, 4), dtype=np.float32)
    heat[row, column] = 3.0
    return heat


def make_case(number: int, phrases: tuple[str, ...]) -> Case:
    """Method m shows phrase p in patch (m, p), shifted by the number of the case."""
    heat = {
        method: np.stack([one_hot((m + number) % 4, p) for p in range(len(phrases))])
        for m, method in enumerate(METHODS)
    }
    image = np.full((16, 24, 3), 60 * number + 40, dtype=np.uint8)
    return Case(
        image=image,
        phrases=phrases,
        heat=heat,
        caption=f"case {number}: {HOSTILE}",
        boxes=[[(0.25, 0.5, 0.75, 1.0)], *([()] * (len(phrases) - 1))],
        values={
            "in the box": {method: [f"{p} %" for p in range(len(phrases))] for method in METHODS}
        },
    )


@pytest.fixture(scope="session")
def page() -> Page:
    rows: list[Row] = [
        dict(zip(METHODS, (0.1, 0.125, 0.672), strict=True), what="Boxes", note="64 classes"),
        dict(zip(METHODS, (0.6, 0.58, 0.5796), strict=True), what="Texts, R@1"),
        {"what": "Stuff", "Untouched": 0.2, "Ordinary": None},
    ]
    curve = [(float(step), 4.0 / (1 + step)) for step in range(20)]
    return Page(
        title=f"Report {HOSTILE}",
        intro=f"Intro {HOSTILE}",
        methods=METHODS,
        table=Table(("what",), METHODS, tuple(rows), sources=(f"caption {HOSTILE}",)),
        contrast=("Ordinary", "Grad-ECLIP"),
        charts=[
            Chart("Global loss (nats)", {"Ordinary": curve, "Grad-ECLIP": curve[:10]}),
            Chart("Nothing was logged", {"Ordinary": [(0.0, float("nan"))]}),
        ],
        cases=[make_case(0, ("red circle", HOSTILE, "blue star")), make_case(1, ("a", "b"))],
        facts={f"Run {HOSTILE}": {"seed": "0", HOSTILE: HOSTILE}},
    )


@pytest.fixture(scope="session")
def browser() -> str:
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip(f"no headless browser: none of {', '.join(BROWSERS)} is installed")
    return found
