"""The model card of an export: `README.md` with the front matter of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gradeclip_ft.export.job import Written
from gradeclip_ft.models.architecture import HUB
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.results.collect import results_folder
from gradeclip_ft.results.record import PACKAGES, Json, Result, read, versions

METHOD = (
    "Exported by `gradeclip_ft`, which fine-tunes CLIP on captions and aligns regions with phrases "
    "through Grad-ECLIP heat maps.\n\n"
    "Zhao et al., *Grad-ECLIP: Gradient-based Visual and Textual Explanations for CLIP*, whose "
    "first extended version describes the fine-tuning."
)


def card(facts: Mapping[str, Json], written: Written) -> str:
    """Markdown from what is known; what is not known is said to be unknown."""
    licence = f"{facts['start_weights_licence']}: {facts['start_weights_licence_note']}."
    parts = [
        _front_matter(facts),
        f"# {facts['run'] or facts['model']}",
        _origin(facts),
        f"## Results\n\n{_results(facts)}",
        f"## Use\n\n{written.usage}",
        "## Checked when written\n\n" + "\n".join(f"- {check}" for check in written.checks),
        f"## Licence of the start weights\n\n{licence}",
        f"## Method\n\n{METHOD}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Mapping[str, Json]) -> str:
    lines = [
        "---",
        f"license: {facts['start_weights_licence']}",
        "library_name: open_clip",
        "pipeline_tag: zero-shot-image-classification",
        "tags: [clip, grad-eclip, region-features]",
        "---",
    ]
    return "\n".join(lines)


def _origin(facts: Mapping[str, Any]) -> str:
    size = "x".join(str(side) for side in facts["image_size"])
    step = "" if facts["step"] is None else f", step {facts['step']}"
    rows = {
        "architecture": f"{facts['model']} at {size} pixels",
        "start weights": facts["start_weights"],
        "run": "none" if facts["run"] is None else f"{facts['run']}{step}",
        "configuration": facts["config_hash"] or "none",
        "share of the fine-tuned weights": f"{facts['alpha']:g}",
        "precision": facts["precision"],
        "SHA-256 of the weights in fp32": facts["weights_hash"],
    }
    return "\n".join(["| | |", "|--|--|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _results(facts: Mapping[str, Any]) -> str:
    """Metrics in percent before and after, one row each."""
    metrics: Mapping[str, Any] = facts["metrics"]
    if not metrics:
        return "Not evaluated."
    rows = [row for name, scores in metrics.items() for row in _rows(name, scores)]
    table = "\n".join(["| metric, % | before | after | step |", "|--|--|--|--|", *rows])
    if all(scores["of_these_weights"] for scores in metrics.values()):
        rounded = facts["precision"] == "float16"
        return f"{table}\n\nMeasured before rounding to fp16." if rounded else table
    return (
        f"{table}\n\nThese are numbers of the run, not of exactly these weights: of another step "
        "or share, or of the start weights alone."
    )


def _rows(evaluator: str, scores: Mapping[str, Any]) -> Iterator[str]:
    before, after = scores["before"], scores["after"]
    for name in (after or before)["metrics"]:
        cells = [
            ""
            if side is None or name not in side["metrics"]
            else f"{100 * side['metrics'][name]:.1f}"
            for side in (before, after)
        ]
        step = "" if after is None else after["step"]
        yield f"| {evaluator}: {name} | {cells[0]} | {cells[1]} | {step} |"


@dataclass(frozen=True)
class Licence:
    """Terms of a set of weights.

    Attributes:
        name: Identifier as model cards on the Hugging Face hub have it.
        note: One sentence for the reader.
    """

    name: str
    note: str


MIT = "MIT, as their publisher states"
# Model, tag, identifier, note; the first that matches counts.
KNOWN = (
    ("shapes_tiny", "packaged", "apache-2.0", "part of gradeclip_ft, Apache-2.0"),
    ("EVA0*", "merged2b_*", "mit", f"EVA-CLIP: {MIT}"),
    ("EVA0*", "laion*", "mit", f"EVA-CLIP: {MIT}"),
    ("*SigLIP*", "webli", "apache-2.0", "SigLIP: Apache-2.0, as their publisher states"),
    ("*", "openai", "mit", f"OpenAI CLIP: {MIT}"),
    ("*", "laion400m_*", "mit", f"open_clip on LAION: {MIT}"),
    ("*", "laion2b_*", "mit", f"open_clip on LAION: {MIT}"),
    ("*", "laion5b_*", "mit", f"open_clip on LAION: {MIT}"),
    ("*", "datacomp_*", "mit", f"DataComp: {MIT}"),
    ("*", "dfn*", "other", "DFN: Apple's own licence, for research; read it before passing on"),
    ("*", "metaclip_*", "cc-by-nc-4.0", "MetaCLIP: CC-BY-NC-4.0, not for commercial use"),
)


def licence_of(model: str, weights: str) -> Licence:
    """Licence of the start weights.

    Args:
        model: Name of the architecture.
        weights: Tag of open_clip, `packaged`, `random`, or a file.
    """
    for models, tags, name, note in KNOWN:
        if fnmatchcase(model, models) and fnmatchcase(weights, tags):
            return Licence(name, note)
    if weights == "random":
        return Licence("unknown", "training began at random weights; there is nothing to inherit")
    return Licence(
        "unknown",
        f"no licence is recorded for the weights {weights} of {model}; ask their publisher before "
        "passing this on",
    )


@dataclass(frozen=True)
class Scores:
    """Results of one evaluator.

    Attributes:
        before: At step 0; None where that was not measured.
        after: The newest after step 0; None where there is none.
    """

    before: Result | None
    after: Result | None


@dataclass(frozen=True)
class Origin:
    """Where exported weights come from.

    Attributes:
        start: Weights before fine-tuning: a tag of open_clip, `packaged`, `random`, or a file.
        alpha: Share of the fine-tuned weights.
        run: Name of the run; None for weights without one.
        step: Optimiser steps of the weights.
        config_hash: Of the run's configuration.
        scores: Results of the run by evaluator.
    """

    start: str
    alpha: float = 1.0
    run: str | None = None
    step: int | None = None
    config_hash: str | None = None
    scores: Mapping[str, Scores] = field(default_factory=dict)


def scores_of(folder: Path) -> dict[str, Scores]:
    """First and newest results of a run, by evaluator; empty where it was never evaluated."""
    found: dict[str, list[Result]] = {}
    for path in sorted(results_folder(folder).glob("*@*.json")):
        result = read(path)
        found.setdefault(result.evaluator, []).append(result)
    return {name: _ends(results) for name, results in found.items()}


def facts(loaded: LoadedClip, origin: Origin, *, target: str, half: bool) -> dict[str, Json]:
    """Everything that a user of the export may ask, as JSON; files by name, without folders."""
    name = loaded.name if loaded.name.startswith(HUB) else Path(loaded.name).name
    start = Path(origin.start).name
    licence = licence_of(name, start)
    weights = loaded.weights_hash
    return {
        "target": target,
        "model": name,
        "image_size": list(loaded.image_size),
        "run": origin.run,
        "step": origin.step,
        "config_hash": origin.config_hash,
        "weights_hash": weights,
        "alpha": origin.alpha,
        "precision": "float16" if half else "float32",
        "start_weights": start,
        "start_weights_licence": licence.name,
        "start_weights_licence_note": licence.note,
        "metrics": {
            name: {
                "before": _numbers(scores.before),
                "after": _numbers(scores.after),
                "of_these_weights": scores.after is not None
                and scores.after.weights.get("hash") == weights,
            }
            for name, scores in origin.scores.items()
        },
        "versions": versions([*PACKAGES, "safetensors", "transformers"]),
    }


def as_strings(facts: Mapping[str, Json]) -> dict[str, str]:
    """Facts for the header of a .safetensors, which holds strings alone."""
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()
    }


def _ends(results: list[Result]) -> Scores:
    ordered = sorted(results, key=lambda result: result.step)
    before = ordered[0] if ordered[0].step == 0 else None
    after = ordered[-1] if ordered[-1].step > 0 else None
    return Scores(before, after)


def _numbers(result: Result | None) -> Json:
    return None if result is None else {"step": result.step, "metrics": dict(result.metrics)}
