"""The page of one evaluation of methods: a table, a bar per method, curves with bands, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradeclip_ft.report.content import Case, Chart, Page
from gradeclip_ft.results.record import AREA_SCALE, Result, unit_of
from gradeclip_ft.results.table import Row, Table

LABEL = "measure"


def evaluation_page(result: Result, cases: Sequence[Case] = ()) -> Page:
    """Everything that a result says of its methods, `METHOD/MEASURE` by name.

    Raises:
        ValueError: No metric is of a method.
    """
    parts = [(name.rpartition("/"), value) for name, value in result.metrics.items()]
    by_measure: dict[str, dict[str, float]] = {}
    for (method, _, measure), value in parts:
        if method:
            by_measure.setdefault(measure, {})[method] = value
    if not by_measure:
        raise ValueError(f"{result.evaluator} compares no methods, so it has no page")
    told: Any = result.protocol.get("methods") or {}
    methods = list(dict.fromkeys(name for values in by_measure.values() for name in values))
    shares = {m: v for m, v in by_measure.items() if unit_of(m, *v.values()) == "%"}
    rows: list[Row] = [{LABEL: measure, **values} for measure, values in shares.items()]
    lower = " Of deletion, less is better." if any("deletion" in name for name in shares) else ""
    model = result.run or Path(str(result.weights.get("name"))).name  # of a folder, not its path
    return Page(
        title=f"{result.evaluator}: {model}, step {result.step}",
        intro=f"{str(result.protocol.get('task')).capitalize()}; {_counts(result)}.",
        methods=methods,
        first=methods[0],
        deltas=False,
        table=Table((LABEL,), tuple(methods), tuple(rows), sources=(f"Per cent.{lower}",)),
        charts=[*_curves(result, methods), *_bars(result, by_measure)],
        heading="Curves and bars",
        cases=cases,
        facts={
            "Protocol": {k: str(v) for k, v in result.protocol.items() if k != "methods"},
            "Methods": {name: str(settings) for name, settings in told.items()},
            "Versions": dict(result.versions),
        },
    )


def _counts(result: Result) -> str:
    counts: Mapping[str, Any] = result.data.get("counts") or {}
    return ", ".join(f"{n} {what}" for what, n in counts.items() if isinstance(n, int))


def _curves(result: Result, methods: Sequence[str]) -> list[Chart]:
    """Means with bands of one standard error over images."""
    curves: Any = result.details.get("curves", {})
    fractions: Any = result.details.get("fractions")
    charts = []
    for column in next(iter(curves.values()), {}):
        told = {name: curves[name][column] for name in methods if column in curves.get(name, {})}
        series, errors = {}, {}
        for name, each in told.items():
            count = len(each["mean"])
            x = range(1, count + 1) if fractions is None else fractions[-count:]
            series[name] = [(float(a), float(b)) for a, b in zip(x, each["mean"], strict=True)]
            errors[name] = each["error"]
        what = "number of words" if fractions is None else "share of the pixels"
        charts.append(
            Chart(f"{column}, %", series, percent=True, markers=True, x=what, errors=errors)
        )
    return charts


def _bars(result: Result, by_measure: Mapping[str, Mapping[str, float]]) -> list[Chart]:
    """One chart per measure, with standard errors over images where values of images are kept."""
    areas: Any = result.details.get("areas", {})
    given: Any = result.details.get("standard_error", {})
    charts = []
    for measure, values in by_measure.items():
        errors = {}
        for name in values:
            key = f"{name}/{measure}"
            if key in areas and len(kept := np.array(areas[key].split(), float)) > 1:
                errors[name] = [float(kept.std(ddof=1)) / AREA_SCALE / len(kept) ** 0.5]
            elif key in given:
                errors[name] = [float(given[key])]
        unit = unit_of(measure, *values.values())
        series = {name: [(0.0, value)] for name, value in values.items()}
        percent = unit == "%"
        charts.append(
            Chart(
                f"{measure}, {unit}".rstrip(", "), series, percent=percent, errors=errors, bars=True
            )
        )
    return charts
