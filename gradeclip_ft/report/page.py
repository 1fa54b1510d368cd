"""One HTML file without outside references, from plain data: `write_page(page, path)`.

All text is escaped by the template; pictures are inline PNG, curves inline SVG. The template, its
parts, its style and its script are in this folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from gradeclip_ft.report import figures
from gradeclip_ft.report.content import Case, Page
from gradeclip_ft.results.table import Table, cells_of

SMALL = 160  # images with a shorter long side are enlarged as visible pixels


def write_page(page: Page, path: Path) -> Path:
    """Write the page under a temporary name, rename it, and return its path."""
    curves = [(chart, figures.curves_svg(chart, page.methods)) for chart in page.charts]
    return write_template(
        "page.html.j2",
        path,
        page=page,
        curves=[(chart, Markup(svg)) for chart, svg in curves if svg is not None],
        cases=[(case, _drawn(case, page.methods)) for case in page.cases],
        has_boxes=any(boxes for case in page.cases for boxes in case.boxes),
        gradient=", ".join(f"rgb({r} {g} {b})" for r, g, b in figures.colours()[::15].tolist()),
    )


def write_table_page(table: Table, path: Path, *, command: str, notes: Sequence[str] = ()) -> Path:
    """Write a page of one table in the style of the others, and return its path.

    Args:
        table: As it is shown.
        path: Of the page.
        command: That makes it again.
        notes: Further lines below the table.
    """
    return write_template(
        "table.html.j2",
        path,
        title=path.stem,
        cells=cells_of(table),
        facts=len(table.facts),
        notes=[*table.notes, *table.sources, *notes],
        command=command,
    )


def write_template(template: str, path: Path, **content: Any) -> Path:
    """Render a template of this folder under a temporary name, rename it, and return its path."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(**content)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    return aside.replace(path)


def _drawn(case: Case, methods: Sequence[str]) -> dict[str, Any]:
    """What the template needs of a case and cannot compute: pictures and values of the maps."""
    height, width = case.image.shape[:2]
    return {
        "photo": figures.png(Image.fromarray(case.image)),
        "ratio": f"{width} / {height}",
        "small": max(height, width) <= SMALL,
        "boxes": case.boxes or [()] * len(case.phrases),
        "maps": {
            method: [
                {
                    "uri": figures.heat_png(heat),
                    "grid": f"{heat.shape[0]} {heat.shape[1]}",
                    "shares": " ".join(map(str, np.rint(100 * scaled).astype(int).ravel())),
                    "empty": not scaled.any(),
                }
                for heat in case.heat[method]
                for scaled in [figures.scale_heat(heat)]
            ]
            for method in methods
        },
    }
