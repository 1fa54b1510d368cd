"""Runs from the same start, as they lie on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gradeclip_ft.commands.runs import read_config, read_environment
from gradeclip_ft.results.collect import Entry, collect
from gradeclip_ft.results.record import Json

UNTOUCHED = "Untouched"
# What `results.collect` calls a run's heat maps, and how people call them.
NAMES = {
    "ordinary": "Ordinary",
    "uniform": "Uniform map",
    "grad_eclip": "Grad-ECLIP",
    "grad_cam": "Grad-CAM",
    "maskclip": "MaskCLIP",
}
# What two runs may differ in and still answer the same question.
OWN = ("name", "objective", "evaluation", "evaluator", "logger", "resume", "runs_dir")


@dataclass(frozen=True)
class Finished:
    """A run as it lies on disk.

    Attributes:
        label: What the page calls it.
        folder: Of the run.
        config: As it was composed.
        environment: Command line, commit, versions, facts about the data.
        results: Evaluations by step, without the weights before training.
        lines: Of `metrics.jsonl`.
    """

    label: str
    folder: Path
    config: DictConfig
    environment: Mapping[str, Any]
    results: Mapping[int, Entry]
    lines: Sequence[Mapping[str, Any]]

    @property
    def end(self) -> Entry:
        """Its last evaluation."""
        return self.results[max(self.results)]


@dataclass(frozen=True)
class Comparison:
    """Runs from the same start, and the start itself where it was evaluated.

    Attributes:
        explainer: Name in conf/explainer of the maps to show; None for that of the last run.
    """

    runs: Sequence[Finished]
    start: Entry | None
    explainer: str | None = None

    @property
    def methods(self) -> list[str]:
        """Names of the columns."""
        return [UNTOUCHED, *(run.label for run in self.runs)]

    @property
    def finals(self) -> dict[str, Entry | None]:
        """Last evaluation by method."""
        return {
            UNTOUCHED: self.start,
            **{run.label: run.end for run in self.runs},
        }


def read_runs(folders: Sequence[Path]) -> Comparison:
    """Runs that started from the same weights.

    Raises:
        FileNotFoundError: A folder is no run, or was not evaluated behind its last step.
        ValueError: The runs started from different weights.
    """
    configs = [read_config(folder) for folder in folders]
    starts: dict[Json, Entry] = {}
    by_run: list[dict[int, Entry]] = []
    for folder in folders:
        entries = collect([str(folder)], steps="all")
        starts |= {weights_hash(entry): entry for entry in entries if entry.step == 0}
        by_run.append({entry.step: entry for entry in entries if entry.step})
        if not by_run[-1]:
            raise FileNotFoundError(
                f"{folder} has no evaluation behind step 0; finish it with resume=auto, or "
                f"evaluate run={folder.name}"
            )
    if len(starts) > 1:
        raise ValueError(
            f"{', '.join(map(str, folders))} started from {len(starts)} different weights; a "
            "report compares runs from one start"
        )
    runs = [
        Finished(label, folder, config, read_environment(folder), results, _lines(folder))
        for label, folder, config, results in zip(
            _labels(folders, by_run), folders, configs, by_run, strict=True
        )
    ]
    return Comparison(runs, next(iter(starts.values()), None))


def same_settings(comparison: Comparison) -> bool:
    """Whether the runs differ in their objective alone: same data, steps, seed and optimiser.

    A run that stopped early counts as different.
    """
    plain = [OmegaConf.to_container(run.config, resolve=True) for run in comparison.runs]
    kept = [
        {key: value for key, value in config.items() if key not in OWN}
        for config in plain
        if isinstance(config, dict)
    ]
    ends = {run.end.step for run in comparison.runs}
    return len(ends) == 1 and all(config == kept[0] for config in kept)


def weights_hash(entry: Entry) -> Json:
    """Hash of the weights behind an evaluation."""
    return next(iter(entry.results.values())).weights.get("hash")


def _labels(folders: Sequence[Path], by_run: Sequence[Mapping[int, Entry]]) -> list[str]:
    """Kinds of heat maps; with the run's name where two runs are of one kind."""
    kinds = [str(next(iter(entries.values())).facts.get("map")) for entries in by_run]
    names = [NAMES.get(kind, kind) for kind in kinds]
    return [
        name if names.count(name) == 1 else f"{name} ({folder.name})"
        for name, folder in zip(names, folders, strict=True)
    ]


def _lines(folder: Path) -> Sequence[Mapping[str, Any]]:
    from gradeclip_ft.training.loggers import JSONL, read_lines

    return read_lines(folder / JSONL) if (folder / JSONL).is_file() else []
