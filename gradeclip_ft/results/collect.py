"""Results on disk to entries of a table: one per run and step, with what the run was.

A place is a run's folder (its results stand in `evaluations/`) or any folder of result files.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gradeclip_ft.results.record import Json, Result, read

Steps = Literal["ends", "last", "all"]
UNTOUCHED = "untouched"
ORDINARY = "ordinary"


@dataclass(frozen=True)
class Entry:
    """One set of weights with its results.

    Attributes:
        run: Name of the run; of the model, for weights before training.
        step: Optimiser steps behind the weights.
        facts: What the run was: `map`, `heads`, `stop_gradient`, `loss`, `seed`, and asked fields.
        results: By name of the evaluator.
        command: Command line that made the weights.
        published: Whether the numbers are those of a paper.
    """

    run: str
    step: int
    facts: Mapping[str, Json]
    results: Mapping[str, Result]
    command: str | None = None
    published: bool = False


@dataclass(frozen=True)
class Place:
    """A folder with results, and the configuration behind them; empty for weights without a run."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None


def collect(
    places: Sequence[str], *, steps: Steps = "ends", fields: Mapping[str, str] | None = None
) -> list[Entry]:
    """Entries of all places in their order; equal weights before training stand there once, first.

    Args:
        places: Folders, or patterns such as `runs/maps_*`.
        steps: "last", "ends" for the last and step 0, or "all".
        fields: More facts: column name to dotted key of the run's configuration.

    Raises:
        FileNotFoundError: Nothing matches, or a folder holds no result.
        ValueError: A result is damaged.
    """
    entries: list[Entry] = []
    for folder in expand(places):
        entries += _entries(open_place(folder), steps, fields or {})
    return _without_repeats(entries)


def expand(places: Sequence[str]) -> list[Path]:
    """Folders behind names and patterns, each once, in order.

    Raises:
        FileNotFoundError: Nothing matches.
    """
    folders: list[Path] = []
    for place in places:
        found = [Path(place)] if Path(place).exists() else sorted(map(Path, glob.glob(place)))
        if not found:
            raise FileNotFoundError(f"no folder {place}; give runs as runs/NAME")
        folders += [path for path in found if path.is_dir() and path not in folders]
    if not folders:
        raise FileNotFoundError("no folder to compare; give one or more runs as runs/NAME")
    return folders


def open_place(folder: Path) -> Place:
    """A run's folder, or a folder of results."""
    config: Mapping[str, Any] = {}
    if (folder / "config.yaml").is_file():
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    command = None
    if (folder / "environment.json").is_file():
        command = _command_line(json.loads((folder / "environment.json").read_text("utf-8")))
    inner = folder / "evaluations"
    return Place(inner if inner.is_dir() else folder, config, command)


def describe(config: Mapping[str, Any], step: int) -> dict[str, Json]:
    """What a run was, by its configuration: map, heads, stop_gradient, loss, seed."""
    facts: dict[str, Json] = dict.fromkeys(("map", "heads", "stop_gradient", "loss", "seed"))
    if step == 0:
        facts["map"] = "start" if config.get("init_from") else UNTOUCHED
        return facts
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


def _entries(place: Place, steps: Steps, fields: Mapping[str, str]) -> list[Entry]:
    by_step: dict[int, dict[str, Result]] = {}
    for path in sorted(place.folder.glob("*@*.json")):
        result = read(path)
        by_step.setdefault(result.step, {})[result.evaluator] = result
    if not by_step:
        raise FileNotFoundError(
            f"no result in {place.folder}; evaluate run=NAME makes them, train too"
        )
    last = max(by_step)
    wanted = {"last": [last], "ends": sorted({0, last} & set(by_step)), "all": sorted(by_step)}
    return [
        Entry(
            run=_name(place, step, by_step[step]),
            step=step,
            facts={
                **describe(place.config, step),
                **{name: _at(place.config, key) if step else None for name, key in fields.items()},
            },
            results=by_step[step],
            command=place.command if step else None,
        )
        for step in wanted[steps]
    ]


def _name(place: Place, step: int, results: Mapping[str, Result]) -> str:
    result = next(iter(results.values()))
    if step == 0:
        return Path(str(result.weights.get("name"))).name  # a folder's own, wherever it stands
    return result.run or place.folder.name


def _without_repeats(entries: Sequence[Entry]) -> list[Entry]:
    """Start weights that several runs share stand at their first place only."""
    return list(_first_of_each(entries))


def _first_of_each(entries: Sequence[Entry]) -> Iterator[Entry]:
    seen: set[str] = set()
    for entry in entries:
        if entry.step == 0:
            content = {
                name: [result.weights.get("hash"), dict(result.metrics), dict(result.protocol)]
                for name, result in sorted(entry.results.items())
            }
            key = json.dumps(content, sort_keys=True)
            if key in seen:
                continue
            seen.add(key)
        yield entry


def _at(config: Mapping[str, Any], key: str) -> Json:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, sort_keys=True)


def _command_line(environment: Mapping[str, Any]) -> str | None:
    command = environment.get("command")
    return command if isinstance(command, str) and command else None
