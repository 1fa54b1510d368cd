"""Rows of the papers' tables, as entries beside ours (`assets/published.json`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gradeclip_ft.results.collect import Entry
from gradeclip_ft.results.record import Result

GROUPS = {
    "segmentation": (
        *("voc21", "context60", "coco_object", "voc20"),
        *("context59", "coco_stuff", "cityscapes", "ade20k"),
    )
}
"""Tables that are asked for together."""

PATH = Path(__file__).parents[1] / "assets" / "published.json"


def tables_of(names: Sequence[str], entries: Sequence[Entry]) -> list[str]:
    """Names of tables, those of `GROUPS` written out.

    Of a group only the tables of data that the entries were measured on, where there are some.
    """
    measured = {r.protocol.get("split") for entry in entries for r in entry.results.values()}
    found: list[str] = []
    for name in names:
        members = GROUPS.get(name, (name,))
        same = [
            m for m in members if _tables().get(m, {}).get("protocol", {}).get("split") in measured
        ]
        found += same if name in GROUPS and same else members
    return list(dict.fromkeys(found))


def published(names: Sequence[str], entries: Sequence[Entry]) -> list[Entry]:
    """Rows of the named tables, under the evaluator of `entries` that is nearest to each.

    Raises:
        ValueError: There is no such table.
    """
    tables = _tables()
    unknown = [name for name in names if name not in tables]
    if unknown:
        raise ValueError(
            f"no published {', '.join(unknown)}; there are {', '.join([*tables, *GROUPS])}"
        )
    found = []
    for name in names:
        table = tables[name]
        wanted, metrics = table["protocol"], set(table["rows"][0]["metrics"])
        # The evaluator of the same task and metrics that differs in the fewest settings.
        differing = {
            evaluator: sum(result.protocol.get(key) != value for key, value in wanted.items())
            for entry in entries
            for evaluator, result in entry.results.items()
            if result.protocol.get("task") == wanted["task"] and metrics & set(result.metrics)
        }
        evaluator = min(differing, key=lambda each: differing[each], default=name)
        for row in table["rows"]:
            result = Result(
                evaluator=evaluator,
                metrics=row["metrics"],
                protocol={**wanted, **row["protocol"]},
                data={"counts": {"images": table.get("images", 0)}},
                weights={"name": row["model"]},
                versions={},
            )
            facts = {"map": row["map"], "published": row["row"]}
            found.append(Entry(name, 0, facts, {evaluator: result}, published=True))
    return found


def published_sources(names: Sequence[str]) -> list[str]:
    """Where the numbers of the named tables come from, one line each."""
    return [f"{name}: {_tables()[name]['source']}." for name in names]


def published_quirks(names: Sequence[str]) -> list[str]:
    """What a reader of the named tables must know, one line each."""
    found: dict[str, list[str]] = {}
    for name in names:
        for quirk in _tables()[name].get("quirks", ()):
            found.setdefault(quirk, []).append(name)
    return [f"{', '.join(tables)}: {quirk}" for quirk, tables in found.items()]


def of_methods(names: Sequence[str]) -> bool:
    """Whether a named table has methods as its rows; the metrics of its one entry say which."""
    return any(_tables()[name].get("methods") for name in names)


@cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return tables
