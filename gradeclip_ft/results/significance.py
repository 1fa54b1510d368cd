"""Is the best method of a column better than the second? p-values as in the papers' tables.

The papers' paired t-test takes the points of two curves as its pairs. Neighbouring points are not
independent, so a bootstrap over images is beside it. Hits of the pointing game are compared by
chi-square with one degree of freedom, without a correction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from gradeclip_ft.results.collect import Entry
from gradeclip_ft.results.record import Result
from gradeclip_ft.results.table import Row, Table

DRAWS = 2000
LOWER = ("deletion", "otd", "kld", "jsd")
"""Measures that begin or end so are better when lower."""
BEST = "two best"


def with_significance(table: Table, entries: Sequence[Entry]) -> Table:
    """The table of methods with the two best of each column, and the p of every test that applies.

    Raises:
        ValueError: No column has what a test needs.
    """
    tests = {
        "p, t-test over points": t_test,
        "p, bootstrap over images": bootstrap_test,
        "p, chi-square of hits": chi_square,
    }
    rows: dict[str, Row] = {name: {"method": name} for name in (BEST, *tests)}
    results = [result for entry in entries for result in entry.results.values()]
    for column in table.metrics:
        measure = column.rpartition("/")[2]
        values = {str(row["method"]): row.get(column) for row in table.rows}
        told = {name: value for name, value in values.items() if isinstance(value, float)}
        order = sorted(told, key=lambda name: told[name], reverse=not is_lower_better(measure))
        if len(order) < 2:
            continue
        first, second = (f"{name}/{measure}" for name in order[:2])
        for result in results:
            found = result.metrics
            if found.get(first) == told[order[0]] and found.get(second) == told[order[1]]:
                for name, test in tests.items():
                    p = test(result, first, second)
                    if p is not None:
                        rows[name][column], rows[BEST][column] = in_words(p), ", ".join(order[:2])
                break
    kept = [row for row in rows.values() if len(row) > 1]
    if not kept:
        raise ValueError(
            "significance=true: no column has curves, values of images, or hits of the pointing "
            "game; evaluate again, or choose them as metrics="
        )
    return replace(table, rows=(*table.rows, *kept))


def is_lower_better(measure: str) -> bool:
    """Whether the smallest value of a measure is the best one."""
    return measure.startswith(LOWER) or measure.endswith(LOWER)


def t_test(result: Result, first: str, second: str) -> float | None:
    """Paired t-test of two curves, point by point (scipy's `ttest_rel`)."""
    curves = [_curve(result, metric) for metric in (first, second)]
    if curves[0] is None or curves[1] is None or len(curves[0]) < 2:
        return None
    return _finite(stats.ttest_rel, *curves)


def bootstrap_test(result: Result, first: str, second: str) -> float | None:
    """Twice the share of draws of images in which the difference has the other sign."""
    kept: Any = result.details.get("areas", {})
    if first not in kept or second not in kept:
        return None
    one, other = (np.array(kept[metric].split(), float) for metric in (first, second))
    if len(one) < 2:
        return None
    draws = stats.bootstrap(
        (one - other,), np.mean, n_resamples=DRAWS, batch=50, method="percentile", rng=0
    ).bootstrap_distribution
    share = min((draws <= 0).mean(), (draws >= 0).mean())
    return float(min(1.0, max(2 * share, 1 / DRAWS)))


def chi_square(result: Result, first: str, second: str) -> float | None:
    """Chi-square of two shares of hits among the same number of phrases."""
    phrases: Any = result.details.get("phrases")
    if not first.endswith("/pointing") or not phrases:
        return None
    hits = np.array([result.metrics[metric] * phrases for metric in (first, second)])
    if hits.sum() in (0, 2 * phrases):
        return 1.0
    return float(stats.chi2_contingency([hits, phrases - hits], correction=False).pvalue)


def in_words(p: float) -> str:
    """A p-value as tables print it.

    >>> in_words(0.0004), in_words(0.3741)
    ('<.001', '.374')
    """
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _curve(result: Result, metric: str) -> Float[ndarray, " S"] | None:
    """Mean curve of a metric; of IMD the difference where both curves have a point."""
    method, _, column = metric.rpartition("/")
    kept: Any = result.details.get("curves", {})
    columns: Mapping[str, Any] = kept.get(method, {})
    if column.startswith("imd"):
        rest = column.removeprefix("imd")
        if f"insertion{rest}" not in columns:
            return None
        inserted, deleted = (np.array(columns[k + rest]["mean"]) for k in ("insertion", "deletion"))
        difference: Float[ndarray, " S"] = inserted - deleted[-len(inserted) :]
        return difference
    return np.array(columns[column]["mean"]) if column in columns else None


def _finite(test: Callable[..., Any], *samples: Any) -> float:
    """The p of a test; 1 where the samples are equal, of which scipy says NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        p = float(test(*samples).pvalue)
    return p if np.isfinite(p) else 1.0
