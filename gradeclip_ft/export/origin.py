"""What an export says about itself: run, step, settings, results, start weights, licence, versions.

The same facts stand in `gradeclip_ft.json` beside every export, in the header of a .safetensors and
in the model card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gradeclip_ft.export.licences import licence_of
from gradeclip_ft.models.architecture import HUB
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.results.collect import open_place
from gradeclip_ft.results.fingerprint import PACKAGES, versions
from gradeclip_ft.results.record import Json, Result, read


@dataclass(frozen=True)
class Scores:
    """Results of one evaluator.

    Attributes:
        before: At step 0; None where that was not measured.
        after: The newest behind step 0; None where there is none.
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
        step: Optimiser steps behind the weights.
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
    for path in sorted(open_place(folder).folder.glob("*@*.json")):
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
