"""What an export says about itself: facts as JSON, and a model card for the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gradeclip_ft.export.job import Written
from gradeclip_ft.models.architecture import HUB
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.results.collect import results_folder
from gradeclip_ft.results.record import PACKAGES, Json, Result, read, unit_of, versions
from gradeclip_ft.results.table import Row, Table, render

METHOD = (
    "Exported by `gradeclip_ft`, which fine-tunes CLIP on captions and aligns regions with phrases "
    "through Grad-ECLIP heat maps.\n\n"
    "Zhao et al., *Grad-ECLIP: Gradient-based Visual and Textual Explanations for CLIP*, whose "
    "first extended version describes the fine-tuning."
)
MIT = "MIT, as their publisher states"
# Model, weights, identifier on the hub, note; the first that matches counts.
LICENCES = (
    ("shapes*_tiny", "packaged", "apache-2.0", "part of gradeclip_ft, Apache-2.0"),
    ("EVA0*", "merged2b_*", "mit", MIT),
    ("*SigLIP*", "webli", "apache-2.0", "Apache-2.0, as their publisher states"),
    ("*", "openai", "mit", MIT),
    ("*", "laion*", "mit", MIT),
    ("*", "datacomp_*", "mit", MIT),
    ("*", "dfn*", "other", "Apple's own licence, for research; read it before passing this on"),
    ("*", "metaclip_*", "cc-by-nc-4.0", "CC-BY-NC-4.0, not for commercial use"),
    ("*", "random", "unknown", "training began at random weights; there is nothing to inherit"),
)


def licence_of(model: str, weights: str) -> tuple[str, str]:
    """Licence of the start weights: identifier as the hub has it, and one sentence.

    Args:
        model: Name of the architecture.
        weights: Tag of open_clip, `packaged`, `random`, or a file.
    """
    for models, tags, name, note in LICENCES:
        if fnmatchcase(model, models) and fnmatchcase(weights, tags):
            return name, note
    return "unknown", (
        f"no licence is recorded for the weights {weights} of {model}; ask their publisher before "
        "passing this on"
    )


Scores = tuple[Result | None, Result | None]
"""Of one evaluator: at step 0, and the newest after it; None where not measured."""


@dataclass(frozen=True)
class Origin:
    """Where exported weights come from.

    Attributes:
        start: Weights before fine-tuning: a tag of open_clip, `packaged`, `random`, or a file.
        alpha: Share of the fine-tuned weights.
        run: Name of the run; None for weights without one.
        step: Optimiser steps that led to the weights.
        config_hash: Of the run's configuration.
        scores: Results of the run by evaluator.
    """

    start: str
    alpha: float = 1.0
    run: str | None = None
    step: int | None = None
    config_hash: str | None = None
    scores: Mapping[str, Scores] = field(default_factory=dict)


def scores_of(folder: Path, alpha: float = 1.0) -> dict[str, Scores]:
    """First and newest results of a run, by evaluator; empty if it was never evaluated.

    Results of the share `alpha` of the tuned weights are taken where there are any.
    """
    results = [read(path) for path in results_folder(folder).glob("*@*.json")]
    results = [result for result in results if result.alpha in (1.0, alpha)]
    by_step = sorted(results, key=lambda result: (result.alpha == alpha, result.step))
    before = {result.evaluator: result for result in by_step if result.step == 0}
    after = {result.evaluator: result for result in by_step if result.step > 0}
    return {name: (before.get(name), after.get(name)) for name in sorted(before.keys() | after)}


def facts(loaded: LoadedClip, origin: Origin, *, target: str, half: bool) -> dict[str, Json]:
    """Everything that a user of the export may ask, as JSON; files by name, without folders."""
    model = loaded.name if loaded.name.startswith(HUB) else Path(loaded.name).name
    start = Path(origin.start).name
    licence, note = licence_of(model, start)
    weights = loaded.weights_hash
    metrics: dict[str, Json] = {}
    for name, (before, after) in origin.scores.items():
        own = after is not None and after.weights.get("hash") == weights
        sides = {
            side: result and {"step": result.step, "metrics": dict(result.metrics)}
            for side, result in (("before", before), ("after", after))
        }
        metrics[name] = {**sides, "of_these_weights": own}
    return {
        "target": target,
        "model": model,
        "image_size": list(loaded.image_size),
        "run": origin.run,
        "step": origin.step,
        "config_hash": origin.config_hash,
        "weights_hash": weights,
        "alpha": origin.alpha,
        "precision": "float16" if half else "float32",
        "start_weights": start,
        "start_weights_licence": licence,
        "start_weights_licence_note": note,
        "metrics": metrics,
        "versions": versions([*PACKAGES, "safetensors", "transformers"]),
    }


def card(facts: Mapping[str, Any], written: Written) -> str:
    """Markdown from what is known; what is not known is said to be unknown."""
    step = "" if facts["step"] is None else f", step {facts['step']}"
    size = "x".join(str(side) for side in facts["image_size"])
    origin = {
        "architecture": f"{facts['model']} at {size} pixels",
        "start weights": facts["start_weights"],
        "run": "none" if facts["run"] is None else f"{facts['run']}{step}",
        "configuration": facts["config_hash"] or "none",
        "share of the fine-tuned weights": f"{facts['alpha']:g}",
        "precision": facts["precision"],
        "SHA-256 of the weights in fp32": facts["weights_hash"],
    }
    lines = "\n".join(f"| {name} | {value} |" for name, value in origin.items())
    checks = "\n".join(f"- {check}" for check in written.checks)
    licence = facts["start_weights_licence"]
    return f"""---
license: {licence}
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, grad-eclip, region-features]
---

# {facts["run"] or facts["model"]}

|  |  |
|--|--|
{lines}

## Results

{_results(facts)}

## Use

{written.usage}

## Checked when written

{checks}

## Licence of the start weights

{licence}: {facts["start_weights_licence_note"]}.

## Method

{METHOD}
"""


def _results(facts: Mapping[str, Any]) -> str:
    """Metrics before and after, one row each."""
    metrics: Mapping[str, Any] = facts["metrics"]
    if not metrics:
        return "Not evaluated."
    rows: list[Row] = []
    for evaluator, scores in metrics.items():
        before, after = (scores[side] or {"metrics": {}} for side in ("before", "after"))
        for name in {**before["metrics"], **after["metrics"]}:
            values = {"before": before["metrics"].get(name), "after": after["metrics"].get(name)}
            unit = unit_of(name, *values.values())
            title = f"{evaluator}: {name}"
            rows.append({"metric": title, "unit": unit, "step": after.get("step"), **values})
    columns = (("metric", "unit"), ("before", "after", "step"))
    table = render(Table(*columns, tuple(rows)), "markdown").rstrip()
    if all(scores["of_these_weights"] for scores in metrics.values()):
        rounded = facts["precision"] == "float16"
        return f"{table}\n\nMeasured before rounding to fp16." if rounded else table
    return (
        f"{table}\n\nThese are numbers of the run, not of exactly these weights: of another step "
        "or share, or of the start weights alone."
    )
