"""The model card of an export: `README.md` with the front matter of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gradeclip_ft.export.job import Written
from gradeclip_ft.results.record import Json

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
