"""Results side by side: rows of facts and metrics, one per set of weights or one per group."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

from gradeclip_ft.results.collect import Entry
from gradeclip_ft.results.record import Json, Result

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
