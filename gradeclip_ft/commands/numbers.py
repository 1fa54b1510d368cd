"""A comparison of runs as table, curves and facts for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from omegaconf import OmegaConf

from gradeclip_ft.commands.comparison import Comparison, Finished, weights_hash
from gradeclip_ft.report.content import Chart, Point, Row, Table
from gradeclip_ft.results.collect import Entry
from gradeclip_ft.results.fingerprint import versions
from gradeclip_ft.results.table import differences

BOXES = "boxes/top1"
METRICS = {
    BOXES: "Boxes, top-1",
    "boxes/top5": "Boxes, top-5",
    "thing_masks/top1": "Masks of things, top-1",
    "thing_masks/top5": "Masks of things, top-5",
    "stuff_masks/top1": "Masks of stuff, top-1",
    "stuff_masks/top5": "Masks of stuff, top-5",
    "image_retrieval_recall@1": "Text to image, R@1",
    "text_retrieval_recall@1": "Image to text, R@1",
}
SETTINGS = {
    "model": "model.name",
    "seed": "seed",
    "steps": "trainer.max_steps",
    "images per step and process": "data.batch_size",
    "learning rate": "optim.optimizer.lr",
    "weight decay": "optim.optimizer.weight_decay",
    "warm-up steps": "optim.schedule.warmup",
    "precision": "trainer.precision",
    "weight of the local loss": "objective.local_weight",
    "local loss": "objective.alignment.kind",
    "phrases per caption, at most": "data.max_phrases",
    "phrase prompt": "data.prompt",
}


def results_table(comparison: Comparison) -> Table:
    """Known metrics as rows, start and runs as columns."""
    finals = {label: entry for label, entry in comparison.finals.items() if entry is not None}
    evaluators = list(dict.fromkeys(name for entry in finals.values() for name in entry.results))
    rows = [
        Row(
            label,
            {method: _metric(entry, name, metric) for method, entry in finals.items()},
            _note(finals, name, metric),
        )
        for name in evaluators
        for metric, label in METRICS.items()
        if any(_metric(entry, name, metric) is not None for entry in finals.values())
    ]
    caption = "Per cent. Small numbers are points above or below the untouched model."
    marks = differences(list(finals.values()))
    for label, mark in zip(finals, marks, strict=True):
        if mark:
            caption += f" Not comparable: {label}, {'; '.join(mark)}."
    labels = [run.label for run in comparison.runs]
    return Table("Results", rows, caption, (labels[0], labels[-1]) if labels[1:] else None)


def charts(comparison: Comparison) -> list[Chart]:
    """Losses as they were logged; accuracy of boxes at the steps where it was measured."""
    logged = {"Global loss (nats)": "global", "Local loss": "local"}
    found = [
        Chart(title, {run.label: _logged(run, key) for run in comparison.runs})
        for title, key in logged.items()
    ]
    measured = {run.label: _measured(run, comparison.start, BOXES) for run in comparison.runs}
    found.append(Chart(METRICS[BOXES], measured, percent=True, markers=True))
    return [chart for chart in found if any(chart.series.values())]


def facts(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Settings of every run, and versions."""
    found = {f"{run.label}: {run.folder.name}": _facts_of(run) for run in comparison.runs}
    last = comparison.runs[-1].environment.get("versions") or versions()
    return {**found, "Versions": {name: str(version) for name, version in last.items()}}


def as_text(table: Table, methods: Sequence[str]) -> str:
    """The results table for a terminal."""
    low, high = table.contrast or ("", "")
    header = ["per cent", *methods, *([f"{high} - {low}"] if table.contrast else [])]
    lines = [header]
    for row in table.rows:
        values = [row.values.get(method) for method in methods]
        cells = ["" if value is None else f"{100 * value:.1f}" for value in values]
        lines.append([row.label, *cells, *([_contrast(row, low, high)] if table.contrast else [])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])
        for cells in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _contrast(row: Row, low: str, high: str) -> str:
    before, after = row.values.get(low), row.values.get(high)
    return "" if before is None or after is None else f"{100 * (after - before):+.1f}"


def _metric(entry: Entry, evaluator: str, metric: str) -> float | None:
    result = entry.results.get(evaluator)
    return None if result is None else result.metrics.get(metric)


def _note(finals: Mapping[str, Entry], evaluator: str, metric: str) -> str:
    """How many classes compete; of which evaluator, where several measure the same."""
    result = next(e.results[evaluator] for e in finals.values() if evaluator in e.results)
    measured_by = {
        name
        for entry in finals.values()
        for name, each in entry.results.items()
        if metric in each.metrics
    }
    classes = result.protocol.get("classes")
    notes = [f"{classes} classes"] if classes and metric.endswith("top1") else []
    return ", ".join([*notes, *([evaluator] if len(measured_by) > 1 else [])])


def _logged(run: Finished, key: str) -> list[Point]:
    return [
        (float(line["step"]), float(line[key])) for line in run.lines if line.get(key) is not None
    ]


def _measured(run: Finished, start: Entry | None, metric: str) -> list[Point]:
    """Of the first evaluator that has the metric."""
    entries = [*([start] if start else []), *(run.results[step] for step in sorted(run.results))]
    points: list[Point] = []
    for entry in entries:
        values = [_metric(entry, name, metric) for name in sorted(entry.results)]
        points += [(float(entry.step), float(v)) for v in values if v is not None][:1]
    return points


def _facts_of(run: Finished) -> dict[str, str]:
    chosen = {name: OmegaConf.select(run.config, key) for name, key in SETTINGS.items()}
    data = run.environment.get("data") or {}
    found = {
        **chosen,
        "tagger": data.get("tagger"),
        "step of the weights": run.end.step,
        "weights": weights_hash(run.end),
        "commit": run.environment.get("commit"),
        "command": run.environment.get("command"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}
