"""Results side by side: rows of facts and metrics, one per set of weights or one per group."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Literal

from gradeclip_ft.results.collect import Entry
from gradeclip_ft.results.record import Json, Result, unit_of, write_atomically, written

Row = dict[str, Json]

ORDER = ("boxes", "thing_masks", "stuff_masks", "image_retrieval", "text_retrieval")
"""Columns stand in this order, those of other metrics behind them."""

MAIN = ("*boxes/top*", "*_masks/top*", "*recall@1")
"""Metrics that a table shows unless others are asked for; `stuff_boxes` is none of them."""

DEVIATION = " sd"


@dataclass(frozen=True)
class Table:
    """Rows and the order of their columns.

    Attributes:
        facts: Columns that say what a row is.
        metrics: Columns of fractions.
        rows: Values by column; a missing one is None.
        notes: Lines below the table.
        sources: For each evaluator, what its numbers were measured on.
    """

    facts: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def tabulate(entries: Sequence[Entry]) -> Table:
    """One row per entry, with every metric; rows of other protocols than the first are marked."""
    owners: dict[str, set[str]] = {}
    for entry in entries:
        for name, result in entry.results.items():
            for metric in result.metrics:
                owners.setdefault(metric, set()).add(name)

    def column(evaluator: str, metric: str) -> str:
        return metric if len(owners[metric]) == 1 else f"{evaluator}:{metric}"

    marks = differences(entries)
    facts = list(dict.fromkeys(name for entry in entries for name in entry.facts))
    metrics: dict[str, None] = {}
    rows: list[Row] = []
    for entry, mark in zip(entries, marks, strict=True):
        step = None if entry.published else entry.step
        row: Row = {"run": entry.run, "step": step, **entry.facts}
        for name, result in sorted(entry.results.items()):
            for metric, value in result.metrics.items():
                row[column(name, metric)] = float(value)
                metrics[column(name, metric)] = None
        rows.append({**row, "differs": "; ".join(mark) or None, "command": entry.command})
    columns = tuple(sorted(metrics, key=_place))
    return Table(("run", "step", *facts), columns, tuple(rows), _notes(rows), _sources(entries))


def differences(entries: Sequence[Entry]) -> list[list[str]]:
    """For each entry, where its protocols or data differ from the first entry that has them."""
    first: dict[str, Entry] = {}
    found: list[list[str]] = []
    for entry in entries:
        lines = []
        for name, result in sorted(entry.results.items()):
            reference = first.setdefault(name, entry).results[name]
            known = set() if entry.published else set(reference.protocol)
            changed = [
                f"{key} {result.protocol.get(key)} instead of {reference.protocol.get(key)}"
                for key in sorted(known | set(result.protocol))
                if result.protocol.get(key) != reference.protocol.get(key)
            ]
            changed += _other_data(entry, result, reference)
            if changed:
                lines.append(f"{name}: {', '.join(changed)}")
        found.append(lines)
    return found


def _other_data(entry: Entry, result: Result, reference: Result) -> list[str]:
    """Data differ by hash; those of a paper, which have none, by their number of images."""
    if not entry.published:
        return ["other data"] * (result.data.get("hash") != reference.data.get("hash"))
    there, here = _images(result), _images(reference)
    return [f"other data, {there} images instead of {here}"] * (there != here)


def _images(result: Result) -> int:
    """Images of the data set, also those without a region or a caption."""
    counts = result.data.get("counts")
    if not isinstance(counts, dict):
        return 0
    skipped: dict[str, int] = counts.get("skipped") or {}
    return int(counts.get("images", 0)) + sum(
        number for cause, number in skipped.items() if cause.startswith("image without")
    )


def _notes(rows: Sequence[Row]) -> tuple[str, ...]:
    """One line for each way in which rows differ from the first."""
    by_mark: dict[str, list[str]] = {}
    for row in rows:
        if row["differs"]:
            place = f"{row['run']}, {row.get('published') or 'step ' + str(row['step'])}"
            by_mark.setdefault(str(row["differs"]), []).append(place)
    return tuple(
        f"{places[0]}{f' and {len(places) - 1} more' if places[1:] else ''}: not comparable, {mark}"
        for mark, places in by_mark.items()
    )


def select(table: Table, patterns: Sequence[str] = MAIN) -> Table:
    """Only the metrics that match a pattern, and only the facts that some row has.

    Raises:
        ValueError: No metric matches.
    """
    kept = [
        metric
        for metric in table.metrics
        if any(fnmatch(metric, pattern) for pattern in patterns)
        and (patterns != MAIN or "stuff_boxes" not in metric)
    ]
    if not kept:
        raise ValueError(
            f"no metric matches {', '.join(patterns)}; there are {', '.join(table.metrics)}"
        )
    facts = [name for name in table.facts if any(row.get(name) is not None for row in table.rows)]
    return replace(table, metrics=tuple(kept), facts=tuple(facts))


def grouped(table: Table, by: Sequence[str]) -> Table:
    """Means and sample deviations over the rows that agree in the columns `by`.

    Raises:
        ValueError: There is no such column.
    """
    unknown = [name for name in by if name not in table.facts]
    if unknown:
        raise ValueError(f"no column {', '.join(unknown)}; choose from {', '.join(table.facts)}")
    groups: dict[str, list[Row]] = {}
    papers = [row for row in table.rows if row.get("published")]
    for row in table.rows:
        if row in papers:
            continue
        groups.setdefault(json.dumps([row.get(name) for name in by]), []).append(row)
    mixed = [
        f"groups mix different {name}; add it to by="
        for name in table.facts
        if name not in (*by, "run", "step", "seed", "published")
        and any(len({str(row.get(name)) for row in members}) > 1 for members in groups.values())
    ]
    return replace(
        table,
        facts=(*by, "rows", *(["published"] if papers else [])),
        rows=(*(_mean(table, by, members) for members in groups.values()), *papers),
        notes=(*table.notes, *mixed),
    )


def _place(metric: str) -> int:
    start = metric.rpartition(":")[2]
    return next((n for n, name in enumerate(ORDER) if start.startswith(name)), len(ORDER))


def _sources(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Data and image size of each evaluator, by its first result."""
    lines: dict[str, str] = {}
    for entry in entries:
        for name, result in sorted(entry.results.items()):
            counts = result.data.get("counts")
            numbers = counts.items() if isinstance(counts, dict) else []
            size = result.protocol.get("image_size")
            said = [f"{size} px", *(f"{n} {what}" for what, n in numbers if isinstance(n, int))]
            lines.setdefault(name, f"{name}: {', '.join(said)}, data {result.data.get('hash')}.")
    return tuple(lines.values())


def _mean(table: Table, by: Sequence[str], members: Sequence[Row]) -> Row:
    row: Row = {name: members[0].get(name) for name in by}
    row["rows"] = len(members)
    for metric in table.metrics:
        values = [value for each in members if isinstance(value := each.get(metric), float)]
        row[metric] = statistics.fmean(values) if values else None
        row[metric + DEVIATION] = statistics.stdev(values) if len(values) > 1 else None
    row["differs"] = next((each["differs"] for each in members if each.get("differs")), None)
    return row


STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2rem; color: #222; }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #ddd; }
td.number { min-width: 7rem; }
.bar { height: 6px; background: #e8e8e8; margin-top: 2px; }
.bar i { display: block; height: 6px; background: #3465a4; }
tr.differs { color: #777; } tr.differs .bar i { background: #b5b5b5; }
"""


def to_html(table: Table) -> str:
    """The page; bars are shares of 100 %, rows that cannot be compared are grey."""
    heads = "".join(f"<th>{escape(name)}</th>" for name in (*table.facts, *table.metrics))
    rows = "".join(_row(table, row) for row in table.rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*table.notes, *table.sources))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Results</title><style>{STYLE}</style></head><body>\n"
        f"<table><thead><tr>{heads}</tr></thead><tbody>\n{rows}</tbody></table>\n"
        f"<ul>{notes}</ul>\n</body></html>\n"
    )


def _row(table: Table, row: Row) -> str:
    facts = "".join(f"<td>{_bar_fact(row.get(name))}</td>" for name in table.facts)
    numbers = "".join(_bar_number(row, metric) for metric in table.metrics)
    kind = f' class="differs" title="{escape(str(row["differs"]))}"' if row.get("differs") else ""
    return f"<tr{kind}>{facts}{numbers}</tr>\n"


def _bar_number(row: Row, metric: str) -> str:
    value, deviation = row.get(metric), row.get(metric + DEVIATION)
    if not isinstance(value, float):
        return "<td></td>"
    spread = f" ± {written(metric, deviation)}" if isinstance(deviation, float) else ""
    if unit_of(metric) != "%":
        return f'<td class="number">{written(metric, value)}{spread}</td>'
    width = f"{100 * min(max(value, 0.0), 1.0):.1f}"
    bar = f'<div class="bar"><i style="width:{width}%"></i></div>'
    return f'<td class="number">{written(metric, value)}{spread}{bar}</td>'


def _bar_fact(value: Json) -> str:
    return "" if value is None else escape(str(value))


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


def by_method(table: Table, labels: Sequence[str] = ("run",)) -> Table:
    """Rows are the first part of `method/measure`, columns `row/measure` of every row with values.

    Args:
        table: Rows of weights.
        labels: Facts whose values name a row; of rows of one name each gets its step too.

    Raises:
        ValueError: No metric has two parts.
    """
    parts = [metric.rpartition("/") for metric in table.metrics]
    methods = list(dict.fromkeys(method for method, _, _ in parts if method))
    measures = list(dict.fromkeys(measure for method, _, measure in parts if method))
    if not methods:
        raise ValueError(f"no metric of a method among {', '.join(table.metrics)}")
    shown = [
        row for row in table.rows if any(row.get(metric) is not None for metric in table.metrics)
    ]
    names = _names(shown, labels)
    columns = [
        (f"{name}/{measure}", measure, row)
        for measure in measures
        for name, row in zip(names, shown, strict=True)
    ]
    rows: list[Row] = []
    for method in methods:
        line: Row = {"method": method}
        for column, measure, row in columns:
            for end in ("", DEVIATION):
                if f"{method}/{measure}{end}" in row:
                    line[column + end] = row[f"{method}/{measure}{end}"]
        rows.append(line)
    metrics = tuple(column for column, _, _ in columns)
    return replace(table, facts=("method",), metrics=metrics, rows=tuple(rows))


def _names(rows: Sequence[Row], labels: Sequence[str]) -> list[str]:
    names = [
        " ".join(str(row[label]) for label in labels if row.get(label) is not None) for row in rows
    ]
    return [
        name if names.count(name) == 1 else f"{name} step {row.get('step')}"
        for name, row in zip(names, rows, strict=True)
    ]


PATH = Path(__file__).parents[1] / "assets" / "published.json"


def published(names: Sequence[str], entries: Sequence[Entry]) -> list[Entry]:
    """Rows of the named tables, under the evaluator of `entries` that is nearest to each.

    Raises:
        ValueError: There is no such table.
    """
    tables = _tables()
    unknown = [name for name in names if name not in tables]
    if unknown:
        raise ValueError(f"no published {', '.join(unknown)}; there are {', '.join(tables)}")
    return [
        _entry(name, tables[name], row, _nearest(name, tables[name], entries))
        for name in names
        for row in tables[name]["rows"]
    ]


def sources(names: Sequence[str]) -> list[str]:
    """Where the numbers of the named tables come from, one line each."""
    return [f"{name}: {_tables()[name]['source']}." for name in names]


def _entry(name: str, table: Mapping[str, Any], row: Mapping[str, Any], evaluator: str) -> Entry:
    result = Result(
        evaluator=evaluator,
        metrics=row["metrics"],
        protocol={**table["protocol"], **row["protocol"]},
        data={"counts": {"images": table["images"]}},
        weights={"name": row["model"]},
        versions={},
    )
    facts = {"map": row["map"], "published": row["row"]}
    return Entry(name, 0, facts, {evaluator: result}, published=True)


def _nearest(name: str, table: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    """The evaluator of the same task and metrics that differs in the fewest settings."""
    wanted = table["protocol"]
    metrics = set(table["rows"][0]["metrics"])
    found: dict[str, int] = {}
    for entry in entries:
        for evaluator, result in entry.results.items():
            same_task = result.protocol.get("task") == wanted["task"]
            if same_task and metrics & set(result.metrics):
                found[evaluator] = sum(result.protocol.get(k) != v for k, v in wanted.items())
    return min(found, key=lambda evaluator: found[evaluator]) if found else name


@cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return tables
