"""A table turned round: what was measured by several methods, one row per method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gradeclip_ft.results.table import DEVIATION, Row, Table


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
