"""Results on disk to entries of a table: one per run and step, with what the run was."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gradeclip_ft.results.record import Json, Result, read, read_mapping

Steps = Literal["ends", "last", "all"]
UNTOUCHED = "untouched"
ORDINARY = "ordinary"


@dataclass(frozen=True)
class Entry:
    """One set of weights with its results.

    Attributes:
        run: Name of the run; of the model, for weights before training.
        step: Optimiser steps of the weights.
        facts: What the run was: `map`, `heads`, `stop_gradient`, `loss`, `seed`; asked fields;
            `alpha` where weights were also mixed with those before training.
        results: By name of the evaluator.
        command: Command line that made the weights.
        published: Whether the numbers are those of a paper.
        start: Hash of the weights at step 0, where they were measured too.
    """

    run: str
    step: int
    facts: Mapping[str, Json]
    results: Mapping[str, Result]
    command: str | None = None
    published: bool = False
    start: str | None = None


def collect(
    places: Sequence[str], *, steps: Steps = "ends", fields: Mapping[str, str] | None = None
) -> list[Entry]:
    """Entries of all places in their order; start weights that several runs share come once, first.

    Args:
        places: Folders of runs or of result files, or patterns such as `runs/maps_*`.
        steps: "last", "ends" for the last and step 0, or "all".
        fields: More facts: column name to dotted key of the run's configuration.

    Raises:
        FileNotFoundError: Nothing matches, or a folder holds no result.
        ValueError: A result is damaged.
    """
    folders: list[Path] = []
    for place in places:
        found = [Path(place)] if Path(place).exists() else sorted(map(Path, glob.glob(place)))
        if not found:
            raise FileNotFoundError(f"no folder {place}; give runs as runs/NAME")
        folders += [path for path in found if path.is_dir() and path not in folders]
    if not folders:
        raise FileNotFoundError("no folder to compare; give one or more runs as runs/NAME")
    entries: dict[str, Entry] = {}
    for folder in folders:
        for entry in _entries(folder, steps, fields or {}):
            # Step 0 comes once where equal weights were measured in the same way.
            measured = {
                name: [result.weights.get("hash"), result.metrics, result.protocol]
                for name, result in sorted(entry.results.items())
            }
            own = json.dumps(measured, sort_keys=True) if entry.step == 0 else str(len(entries))
            entries.setdefault(own, entry)
    return list(entries.values())


def results_folder(folder: Path) -> Path:
    """Where the result files of a run's folder are; any other folder holds them itself."""
    inner = folder / "evaluations"
    return inner if inner.is_dir() else folder


def _run_facts(config: Mapping[str, Any], step: int) -> dict[str, Json]:
    facts: dict[str, Json] = dict.fromkeys(("map", "heads", "stop_gradient", "loss", "seed"))
    if step == 0:
        facts["map"] = "start" if config.get("init_from") else UNTOUCHED
        return facts
    if (config.get("model") or {}).get("settings"):
        return {**_facts_of_start(config), "seed": config.get("seed")}
    objective = config.get("objective") or {}
    explainer = objective.get("explainer")
    facts["seed"] = config.get("seed")
    if explainer:
        facts["map"] = str(explainer.get("_target_", "?")).split(".")[-2:][0]
        facts["heads"] = explainer.get("heads")
        facts["stop_gradient"] = not explainer.get("create_graph", False)
        facts["loss"] = (objective.get("alignment") or {}).get("kind")
    elif objective:
        facts["map"] = ORDINARY
    return facts


def _facts_of_start(config: Mapping[str, Any]) -> dict[str, Json]:
    """What the frozen model of a detector was, by the run that it was taken from."""
    start = config.get("init_from")
    nothing: dict[str, Json] = dict.fromkeys(("map", "heads", "stop_gradient", "loss"))
    if start is None:
        return {**nothing, "map": UNTOUCHED}
    found = [Path(str(start)), Path(str(config.get("runs_dir"))) / str(start)]
    for folder in (place.parent if place.is_file() else place for place in found):
        if before := read_mapping(folder / "config.yaml"):
            return _run_facts(before, 1)
    return {**nothing, "map": str(start)}


def _entries(folder: Path, steps: Steps, fields: Mapping[str, str]) -> list[Entry]:
    """Entries of one folder; weights without a run have no configuration."""
    config = read_mapping(folder / "config.yaml")
    command = read_mapping(folder / "environment.json").get("command")
    by_weights: dict[tuple[int, float], dict[str, Result]] = {}
    for path in sorted(results_folder(folder).glob("*@*.json")):
        result = read(path)
        by_weights.setdefault((result.step, -result.alpha), {})[result.evaluator] = result
    if not by_weights:
        raise FileNotFoundError(
            f"no result in {results_folder(folder)}; train and evaluate run=NAME write them"
        )
    last = max(step for step, _ in by_weights)
    wanted = {"last": [last], "ends": [0, last], "all": [step for step, _ in by_weights]}
    starts = [str(one.weights.get("hash")) for one in by_weights.get((0, -1.0), {}).values()]
    entries = []
    for (step, _), results in sorted(by_weights.items()):
        if step not in wanted[steps]:
            continue
        result = next(iter(results.values()))
        several = sum(other == step for other, _ in by_weights) > 1
        shares: dict[str, Json] = {"alpha": result.alpha} if several else {}
        # The weights before training may be a file: its own name, wherever it lies.
        model = Path(str(result.weights.get("name"))).name
        asked = {name: _at(config, key) if step else None for name, key in fields.items()}
        entries.append(
            Entry(
                run=(result.run or results_folder(folder).name) if step else model,
                step=step,
                facts={**_run_facts(config, step), **shares, **asked},
                results=results,
                command=(command or None) if step else None,
                start=starts[0] if starts else None,
            )
        )
    return entries


def _at(config: Mapping[str, Any], key: str) -> Json:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, sort_keys=True)
