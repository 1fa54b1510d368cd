"""Bootstrap intervals over the images of an evaluation, and of differences of two of them.

Images are drawn with replacement; the regions or queries of an image come together, since they are
not independent. Two results on the same images see the same draws, so their difference is paired
(Efron and Tibshirani, "An Introduction to the Bootstrap", percentile intervals). A gallery that is
searched stays as it is: only the queries are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradeclip_ft.results.collect import Entry
from gradeclip_ft.results.record import Result
from gradeclip_ft.results.table import HIGH, LOW, Row, Table

DRAWS = 1000
ENDS = (2.5, 97.5)  # percent


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
    """The table with 95 % intervals, and rows of the paired differences from its first row.

    Metrics without samples have none.
    """
    draws = [_by_column(row, entry) for row, entry in zip(table.rows, entries, strict=True)]
    rows = [row | _ends(found) for row, found in zip(table.rows, draws, strict=True)]
    first, start = table.rows[0], draws[0]
    for row, found in zip(table.rows[1:], draws[1:], strict=True):
        differences = {name: found[name] - start[name] for name in found if name in start}
        name = f"{row['run']} - {first['run']}"
        more: Row = {"run": name, "step": row.get("step"), "command": None, "differs": None}
        more |= {key: row.get(key) for key in ("alpha",) if key in row}
        for column in differences:
            more[column] = float(str(row[column])) - float(str(first[column]))
        rows.append(more | _ends(differences))
    note = f"[ ]: 95 % of {DRAWS} draws of images; differences over the same draws"
    return replace(table, rows=tuple(rows), notes=(*table.notes, note))


def _by_column(row: Row, entry: Entry) -> dict[str, NDArray[np.float64]]:
    """Draws by the column that a metric has in the table."""
    found = {}
    for name, result in entry.results.items():
        for metric, values in bootstrap(result).items():
            long = f"{name}:{metric}"
            found[long if long in row else metric] = values
    return found


def _ends(draws: Mapping[str, NDArray[np.float64]]) -> Row:
    ends: Row = {}
    for column, values in draws.items():
        low, high = np.percentile(values, ENDS)
        ends |= {column + LOW: float(low), column + HIGH: float(high)}
    return ends
