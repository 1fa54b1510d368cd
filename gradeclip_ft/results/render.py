"""A table as text, Markdown, CSV or HTML, and the two files a repository keeps of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from gradeclip_ft.results.bars import to_html
from gradeclip_ft.results.record import Json, unit_of, write_atomically, written
from gradeclip_ft.results.table import DEVIATION, Table

Format = Literal["text", "markdown", "csv", "html"]
SHORT = (("image_retrieval_recall", "image R"), ("text_retrieval_recall", "text R"))


def render(table: Table, style: Format) -> str:
    """The table with its notes."""
    if style == "csv":
        return _to_csv(table)
    if style == "html":
        return to_html(table)
    header = [*table.facts, *map(_short, table.metrics)]
    marked = any(row.get("differs") for row in table.rows)
    lines = [
        [
            *(_fact(row.get(name)) for name in table.facts),
            *(_number(row, metric) for metric in table.metrics),
            *((["≠"] if row.get("differs") else [""]) if marked else []),
        ]
        for row in table.rows
    ]
    cells = [header + ([""] if marked else []), *lines]
    body = _markdown(cells) if style == "markdown" else _aligned(cells)
    return "\n".join([*body, *(["", *table.notes] if table.notes else [])]) + "\n"


def write_table(
    path: Path, table: Table, shown: Table, *, command: str, notes: Sequence[str] = ()
) -> list[Path]:
    """Write `<path>.md` (the shown table, its command, notes) and `<path>.json` (all rows).

    A path that ends in .csv or .html gets the shown table in that form alone.
    """
    if path.suffix in (".csv", ".html"):
        write_atomically(path, render(shown, "csv" if path.suffix == ".csv" else "html"))
        return [path]
    text = "\n".join(
        [
            f"# {path.name}",
            "",
            "Made by",
            "",
            f"    {command}",
            "",
            _units(shown),
            "",
            render(shown, "markdown"),
            *(f"- {line}" for line in (*table.sources, *notes)),
        ]
    )
    written = [path.parent / f"{path.name}.md", path.parent / f"{path.name}.json"]
    write_atomically(written[0], text.rstrip() + "\n")
    rows = [{name: value for name, value in row.items() if name != "differs"} for row in table.rows]
    write_atomically(written[1], json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return written


def _units(table: Table) -> str:
    units = {unit_of(metric) for metric in table.metrics}
    if units == {"%"}:
        return "Metrics in percent."
    others = "seconds, and multiples of the time of encode_image"
    return f"Metrics in {others}." if "%" not in units else f"Metrics in percent; {others}."


def _number(row: Mapping[str, Json], metric: str) -> str:
    value, deviation = row.get(metric), row.get(metric + DEVIATION)
    if not isinstance(value, float):
        return ""
    spread = f" ± {written(metric, deviation)}" if isinstance(deviation, float) else ""
    return written(metric, value) + spread


def _fact(value: Json) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _short(metric: str) -> str:
    for name, short in SHORT:
        metric = metric.replace(name, short)
    return metric


def _markdown(cells: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    return [lines[0], "|" + "--|" * len(cells[0]), *lines[1:]]


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _to_csv(table: Table) -> str:
    deviations = [
        m + DEVIATION for m in table.metrics if any(m + DEVIATION in r for r in table.rows)
    ]
    buffer = io.StringIO()
    names = [*table.facts, *table.metrics, *deviations, "differs"]
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    return buffer.getvalue()
