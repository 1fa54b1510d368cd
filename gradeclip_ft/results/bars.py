"""A table as one HTML page without outside references: every number with a bar."""

from __future__ import annotations

from html import escape

from gradeclip_ft.results.record import Json, unit_of, written
from gradeclip_ft.results.table import DEVIATION, Row, Table

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
    facts = "".join(f"<td>{_fact(row.get(name))}</td>" for name in table.facts)
    numbers = "".join(_number(row, metric) for metric in table.metrics)
    kind = f' class="differs" title="{escape(str(row["differs"]))}"' if row.get("differs") else ""
    return f"<tr{kind}>{facts}{numbers}</tr>\n"


def _number(row: Row, metric: str) -> str:
    value, deviation = row.get(metric), row.get(metric + DEVIATION)
    if not isinstance(value, float):
        return "<td></td>"
    spread = f" ± {written(metric, deviation)}" if isinstance(deviation, float) else ""
    if unit_of(metric) != "%":
        return f'<td class="number">{written(metric, value)}{spread}</td>'
    width = f"{100 * min(max(value, 0.0), 1.0):.1f}"
    bar = f'<div class="bar"><i style="width:{width}%"></i></div>'
    return f'<td class="number">{written(metric, value)}{spread}{bar}</td>'


def _fact(value: Json) -> str:
    return "" if value is None else escape(str(value))
