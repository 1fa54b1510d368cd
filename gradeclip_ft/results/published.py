"""Numbers of the papers as entries of a table, beside ours.

`assets/published.json` holds tables; each has its source, the protocol it was measured by as far as
that is known, the number of images, and rows with their model, size and metrics as fractions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gradeclip_ft.results.collect import Entry
from gradeclip_ft.results.record import Result

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
