"""Bootstrap intervals over the images of an evaluation, and of differences of two of them.

Images are drawn with replacement; the regions or queries of an image come together, since they are
not independent. Two results on the same images see the same draws, so their difference is paired
(Efron and Tibshirani, "An Introduction to the Bootstrap", percentile intervals). A gallery that is
searched stays as it is: only the queries are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradeclip_ft.results.collect import Entry
from gradeclip_ft.results.record import Result
from gradeclip_ft.results.table import HIGH, LOW, Row, Table

DRAWS = 1000
ENDS = (2.5, 97.5)  # percent
Draws: TypeAlias = dict[tuple[str, str], NDArray[np.float64]]


def bootstrap(result: Result) -> dict[str, NDArray[np.float64]]:
    """Values of every metric whose samples the result keeps, one for each draw of images, (draws).

    Class means are over the classes that occur in a draw.
    """
    kept = result.details.get("samples")
    samples: Mapping[str, Mapping[str, str]] = kept if isinstance(kept, dict) else {}
    groups = {
        group: {name: np.array(text.split(), np.int64) for name, text in columns.items()}
        for group, columns in samples.items()
    }
    images = 1 + max((int(columns["image"].max()) for columns in groups.values()), default=0)
    random = np.random.default_rng(0)
    times = random.multinomial(images, np.full(images, 1 / images), size=DRAWS).astype(float)
    found = {}
    for metric in result.metrics:
        group = metric.partition("/")[0] if "/" in metric else metric.rpartition("_")[0]
        if group in groups:
            found[metric] = _values(metric.removeprefix(group)[1:], groups[group], times)
    return found


def _values(
    name: str, columns: Mapping[str, NDArray[np.int64]], times: NDArray[np.float64]
) -> NDArray[np.float64]:
    """One metric of a group in every draw, (draws)."""
    kind = name.removeprefix("micro_").removeprefix("rest_").removeprefix("recall@")
    own = kind.removesuffix("_top1")
    if own in columns:  # a rank among other classes, such as among_stuff
        score = (columns[own] < 1).astype(float)
    elif kind == "mrr":
        score = 1 / (columns["rank"] + 1.0)
    else:
        score = (columns["rank"] < int(kind.removeprefix("top"))).astype(float)
    alike = name.startswith(("micro_", "recall@"))
    label = np.zeros(len(score), np.int64) if alike else columns["label"]
    classes, place = np.unique(label, return_inverse=True)
    table = np.zeros((2, times.shape[1], len(classes)))  # of each image: scores, and their number
    np.add.at(table[0], (columns["image"], place), score)
    np.add.at(table[1], (columns["image"], place), 1)
    if name.startswith("rest_"):
        table = np.delete(table, table[1].sum(0).argmax(), axis=2)
    total, count = times @ table  # (draws, classes) each
    values: NDArray[np.float64] = (total / np.maximum(count, 1)).sum(1) / (count > 0).sum(1)
    return values


def with_intervals(table: Table, entries: Sequence[Entry]) -> Table:
    """The table with 95 % intervals, and rows of paired differences.

    A row is compared with the start weights that it comes from, on the same data; where they are
    not in the table, with the first row of the same start and the same share of tuned weights. The
    first one of other start weights is compared with the first of all. Where a run's start was not
    measured, it is the last one before of the same model. Metrics without samples have no interval.
    """
    draws = [_by_column(row, entry) for row, entry in zip(table.rows, entries, strict=True)]
    rows = [row | _ends(found) for row, found in zip(table.rows, draws, strict=True)]
    latest: dict[str, str] = {}  # start weights by model
    # By start (None: any), share of tuned weights (None: of none), column and data.
    first: dict[tuple[str | None, float | None, str, str], int] = {}
    for place, (row, entry, found) in enumerate(zip(table.rows, entries, draws, strict=True)):
        result = next(iter(entry.results.values()))
        model, share = str(result.weights.get("name")), result.alpha if entry.step else None
        start = latest[model] = entry.start or latest.get(model, model)
        differences: dict[int, Draws] = {}
        for key in found:
            base = place
            for group in (start, None):
                before = first.get((group, None, *key), first.get((group, share, *key), place))
                first.setdefault((group, share, *key), place)
                base = before if base == place else base
            if base != place:
                differences.setdefault(base, {})[key] = found[key] - draws[base][key]
        for base, values in differences.items():
            name = f"{row['run']} - {table.rows[base]['run']}"
            more: Row = {"run": name, "step": row.get("step"), "command": None, "differs": None}
            more |= {key: row.get(key) for key in ("alpha",) if key in row}
            for column, _ in values:
                more[column] = float(str(row[column])) - float(str(table.rows[base][column]))
            rows.append(more | _ends(values))
    note = f"[ ]: 95 % of {DRAWS} draws of images; differences over the same draws"
    return replace(table, rows=tuple(rows), notes=(*table.notes, note))


def _by_column(row: Row, entry: Entry) -> Draws:
    """Draws by the column that a metric has in the table, and by the data that were drawn from."""
    found = {}
    for name, result in entry.results.items():
        for metric, values in bootstrap(result).items():
            long = f"{name}:{metric}"
            found[long if long in row else metric, str(result.data.get("hash"))] = values
    return found


def _ends(draws: Draws) -> Row:
    ends: Row = {}
    for (column, _), values in draws.items():
        low, high = np.percentile(values, ENDS)
        ends |= {column + LOW: float(low), column + HIGH: float(high)}
    return ends
