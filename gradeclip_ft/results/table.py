"""The table of results: one row per set of weights, what may be compared, and how it is written.

Every table that a command prints is a `Table` written by `render`.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Literal

from gradeclip_ft.results.collect import Entry
from gradeclip_ft.results.record import Json, Result, unit_of, write_atomically, written

Format = Literal["text", "markdown", "csv"]
Row = dict[str, Json]

ORDER = ("boxes", "thing_masks", "stuff_masks", "image_retrieval", "text_retrieval")
"""Metrics that begin so are the first columns, in this order."""

MAIN = ("*boxes/top*", "*_masks/top*", "*recall@1", "*/AP50", "*/mIoU")
"""Metrics that a table shows unless others are asked for; `stuff_boxes` is left out too."""

FEW = 100  # images, of which one is a point or more

DEVIATION, LOW, HIGH = " sd", " low", " high"
SHORT = {"image_retrieval_recall": "image R", "text_retrieval_recall": "text R"}


@dataclass(frozen=True)
class Table:
    """Rows and the order of their columns.

    Attributes:
        facts: Columns that say what a row is.
        metrics: Columns of numbers. A float is in the unit of the row's `metric`, if it has one,
            else in that of the column's name; a text is written as it is.
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
    measured = {(m, name) for e in entries for name, r in e.results.items() for m in r.metrics}
    owners = Counter(metric for metric, _ in measured)
    metrics: dict[str, None] = {}
    rows: list[Row] = []
    by_mark: dict[str, list[str]] = {}
    for entry, mark in zip(entries, differences(entries), strict=True):
        row: Row = {"run": entry.run, "step": None if entry.published else entry.step}
        row |= entry.facts
        for name, result in sorted(entry.results.items()):
            for metric, value in result.metrics.items():
                column = metric if owners[metric] == 1 else f"{name}:{metric}"
                row[column] = float(value)
                metrics[column] = None
        if mark:
            which = row["published"] if entry.published else f"step {entry.step}"
            by_mark.setdefault(mark, []).append(f"{entry.run}, {which}")
        rows.append({**row, "differs": mark or None, "command": entry.command})
    notes = [
        f"{first}{f' and {len(others)} more' if others else ''}: not comparable, {mark}"
        for mark, (first, *others) in by_mark.items()
    ]
    facts = dict.fromkeys(name for entry in entries for name in entry.facts)
    ranked = [m for first in (*ORDER, "") for m in metrics if m.split(":")[-1].startswith(first)]
    columns = tuple(dict.fromkeys(ranked))
    return Table(("run", "step", *facts), columns, tuple(rows), tuple(notes), measured_on(entries))


def metrics_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """One row per metric, with its unit; one column for each of the given sets of numbers."""
    metrics = dict.fromkeys(metric for numbers in columns.values() for metric in numbers)
    rows: list[Row] = [
        {
            "metric": metric,
            "unit": unit_of(metric, *(numbers.get(metric) for numbers in columns.values())),
        }
        | {name: numbers.get(metric) for name, numbers in columns.items()}
        for metric in metrics
    ]
    return Table(("metric", "unit"), tuple(columns), tuple(rows))


def differences(entries: Sequence[Entry]) -> list[str]:
    """For each entry, where its protocols or data differ from the first entry that has them.

    A paper names fewer settings than we record, so only those count there; and it has no hash of
    its data, so the number of images is compared instead.
    """
    first: dict[str, Result] = {}
    found: list[str] = []
    for entry in entries:
        lines = []
        for name, result in sorted(entry.results.items()):
            reference = first.setdefault(name, result)
            keys = set(result.protocol) | (set() if entry.published else set(reference.protocol))
            changed = [
                f"{key} {result.protocol.get(key)} instead of {reference.protocol.get(key)}"
                for key in sorted(keys)
                if result.protocol.get(key) != reference.protocol.get(key)
            ]
            there, here = _images(result), _images(reference)
            if entry.published and there and there != here:
                changed.append(f"other data, {there} images instead of {here}")
            elif not entry.published and result.data.get("hash") != reference.data.get("hash"):
                changed.append("other data")
            if changed:
                lines.append(f"{name}: {', '.join(changed)}")
        found.append("; ".join(lines))
    return found


def select(table: Table, patterns: Sequence[str] = MAIN) -> Table:
    """Only the metrics that match a pattern, and only the facts that some row has.

    All metrics where the usual patterns match none, as of evaluators of one's own.

    Raises:
        ValueError: No metric matches.
    """
    kept = [
        metric
        for metric in table.metrics
        if any(fnmatch(metric, pattern) for pattern in patterns)
        and (patterns != MAIN or "stuff_boxes" not in metric)
    ]
    if not kept and patterns == MAIN:
        kept = list(table.metrics)
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
    papers = [row for row in table.rows if row.get("published")]
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        if not row.get("published"):
            groups.setdefault(json.dumps([row.get(name) for name in by]), []).append(row)
    means: list[Row] = []
    for members in groups.values():
        mean: Row = {name: members[0].get(name) for name in by} | {"rows": len(members)}
        for metric in table.metrics:
            values = [value for row in members if isinstance(value := row.get(metric), float)]
            mean[metric] = statistics.fmean(values) if values else None
            mean[metric + DEVIATION] = statistics.stdev(values) if len(values) > 1 else None
        mean["differs"] = next((row["differs"] for row in members if row.get("differs")), None)
        means.append(mean)
    mixed = [
        f"groups mix different {name}; add it to by="
        for name in table.facts
        if name not in (*by, "run", "step", "seed", "published")
        and any(len({str(row.get(name)) for row in members}) > 1 for members in groups.values())
    ]
    return replace(
        table,
        facts=(*by, "rows", *(["published"] if papers else [])),
        rows=(*means, *papers),
        notes=(*table.notes, *mixed),
    )


def by_method(table: Table, labels: Sequence[str] = ("run",)) -> Table:
    """Rows are the first part of `method/measure`, columns `row/measure` of every row with values.

    Args:
        table: Rows of weights.
        labels: Facts whose values name a row; rows of equal names are told apart by their step.

    Raises:
        ValueError: No metric has two parts.
    """
    parts = [_parts(metric) for metric in table.metrics]
    parts = [each for each in parts if each[1]]
    if not parts:
        raise ValueError(f"no metric of a method among {', '.join(table.metrics)}")
    shown = [row for row in table.rows if any(row.get(m) is not None for m in table.metrics)]
    names = [" ".join(str(row[k]) for k in labels if row.get(k) is not None) for row in shown]
    names = [
        name if names.count(name) == 1 else f"{name} step {row.get('step')}"
        for name, row in zip(names, shown, strict=True)
    ]
    rows: dict[str, Row] = {method: {"method": method} for _, method, _ in parts}
    columns: dict[str, None] = {}
    for evaluator, measure in dict.fromkeys((evaluator, m) for evaluator, _, m in parts):
        for name, row in zip(names, shown, strict=True):
            # A method that several evaluators measured has a column for each of them.
            title = name if evaluator in ("", name) else f"{name} {evaluator}"
            for method, line in rows.items():
                metric = f"{evaluator}:{method}/{measure}" if evaluator else f"{method}/{measure}"
                if row.get(metric) is not None:
                    columns[f"{title}/{measure}"] = None
                    for end in ("", DEVIATION):
                        line[f"{title}/{measure}{end}"] = row.get(f"{metric}{end}")
    return replace(table, facts=("method",), metrics=tuple(columns), rows=tuple(rows.values()))


def _parts(metric: str) -> tuple[str, str, str]:
    """Evaluator (empty where one alone has it), method and measure.

    >>> _parts("voc21:sclip/mIoU"), _parts("game/pointing")
    (('voc21', 'sclip', 'mIoU'), ('', 'game', 'pointing'))
    """
    head, _, measure = metric.rpartition("/")
    evaluator, _, method = head.rpartition(":")
    return evaluator, method, measure


def cells_of(table: Table) -> list[list[str]]:
    """Header and rows as people read them; a last column marks rows that do not compare."""
    marked = any(row.get("differs") for row in table.rows)
    names = [*table.facts, *table.metrics]
    cells = [[*map(_header, names), *([""] if marked else [])]]
    for row in table.rows:
        values = [_fact(row.get(name)) for name in table.facts]
        values += [_number(table, row, metric) for metric in table.metrics]
        cells.append([*values, *(["≠" if row.get("differs") else ""] if marked else [])])
    return cells


def render(table: Table, style: Format = "text") -> str:
    """The table with its notes; csv holds fractions, the others what people read."""
    if style == "csv":
        return _csv(table)
    cells = cells_of(table)
    names = [*table.facts, *table.metrics, ""][: len(cells[0])]
    if style == "markdown":
        body = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells
        ]
        body.insert(1, "|" + "--|" * len(names))
    else:
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        body = [
            "  ".join(
                cell.rjust(width) if name in table.metrics else cell.ljust(width)
                for name, cell, width in zip(names, line, widths, strict=True)
            ).rstrip()
            for line in cells
        ]
        body.insert(1, "  ".join("-" * width for width in widths).rstrip())
    return "\n".join([*body, *(["", *table.notes] if table.notes else [])]) + "\n"


def write_table(
    path: Path, table: Table, shown: Table, *, command: str, notes: Sequence[str] = ()
) -> list[Path]:
    """Write `<path>.md` (the shown table, its command, notes) and `<path>.json` (all rows).

    A path that ends in .csv gets the shown table in that form alone.
    """
    if path.suffix == ".csv":
        write_atomically(path, render(shown, "csv"))
        return [path]
    units = {unit_of(metric, *_beside(shown, {}, metric)) for metric in shown.metrics}
    said = ["percent"] * ("%" in units)
    said += ["seconds, and multiples of the time of encode_image"] * bool(units & {"s", "x"})
    said += sorted(units - {"%", "s", "x", ""})
    said += ["their own unit where values are beyond 1"] * ("" in units)
    lines = [f"# {path.name}", "", "Made by", "", f"    {command}", ""]
    lines += [f"Metrics in {'; '.join(said)}.", "", render(shown, "markdown")]
    lines += [f"- {line}" for line in (*table.sources, *notes)]
    rows = [{name: value for name, value in row.items() if name != "differs"} for row in table.rows]
    paths = [path.parent / f"{path.name}.md", path.parent / f"{path.name}.json"]
    write_atomically(paths[0], "\n".join(lines).rstrip() + "\n")
    write_atomically(paths[1], json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return paths


def measured_on(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Data and image size of each evaluator, by its first result; of few photos, what one is."""
    lines: dict[str, str] = {}
    for entry in entries:
        for name, result in sorted(entry.results.items()):
            size, counts = result.protocol.get("image_size"), result.data.get("counts") or {}
            data = f"data {result.data.get('hash')}"
            said = [f"{n} {what}" for what, n in counts.items() if isinstance(n, int)]
            said = [f"{size} px", *said] if size else said
            images = counts.get("images", 0)
            if "captions" in counts and 0 < images < FEW:  # region metrics count regions
                said.append(f"one image is {100 / images:.1f} points")
            lines.setdefault(name, f"{name}: {', '.join([*said, data])}.")
    return tuple(lines.values())


def _images(result: Result) -> int:
    """Images of the data set, also those without a region or a caption."""
    counts = result.data.get("counts") or {}
    skipped: dict[str, int] = counts.get("skipped") or {}
    left_out = (n for cause, n in skipped.items() if cause.startswith("image without"))
    return int(counts.get("images", 0)) + sum(left_out)


def _header(name: str) -> str:
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name


def _fact(value: Json) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _number(table: Table, row: Row, column: str) -> str:
    value, deviation = row.get(column), row.get(column + DEVIATION)
    if not isinstance(value, float):
        return _fact(value)
    metric = str(row.get("metric", column))
    # A value below 1 is not a fraction where others of its metric are beyond 1.
    write = partial(written, metric)
    beside = _beside(table, row, column)
    spread = f" ± {write(deviation, *beside)}" if isinstance(deviation, float) else ""
    low, high = row.get(column + LOW), row.get(column + HIGH)
    if isinstance(low, float) and isinstance(high, float):
        spread += f" [{write(low, *beside)}, {write(high, *beside)}]"
    return write(value, *beside) + spread


def _beside(table: Table, row: Row, column: str) -> list[float]:
    """All values of the metric of a cell: its row where that names a metric, else its column."""
    if "metric" in row:
        values = [row.get(name) for name in table.metrics]
    else:
        values = [other.get(column) for other in table.rows]
    return [value for value in values if isinstance(value, float)]


def _csv(table: Table) -> str:
    spreads = [metric + end for metric in table.metrics for end in (DEVIATION, LOW, HIGH)]
    spreads = [name for name in spreads if any(row.get(name) is not None for row in table.rows)]
    buffer = io.StringIO()
    names = [*table.facts, *table.metrics, *spreads, "differs"]
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    return buffer.getvalue()
