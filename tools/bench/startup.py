"""From the command to its answer: help, lists, and the first training step."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .publish import Section, publish

PROGRAM = (sys.executable, "-m", "gradeclip_ft")
SMOKE = ("train", "+exp=smoke", "name=bench", "evaluation.before=false", "evaluation.after=false")


def startup(*, rounds: int = 7, out: Path | None = None) -> None:
    """Wall and CPU seconds of --help, of list, and of a command up to its first training step."""
    rows: dict[str, dict[str, float | str]] = {}
    for words in (("--help",), ("list",), ("list", "explainers"), ("train", "--help")):
        rows[" ".join(words)] = _times([_run(words) for _ in range(rounds)])
    first = [_first_step() for _ in range(max(rounds // 2, 1))]
    rows["+exp=smoke up to its first step, data drawn"] = _times([made for made, _ in first])
    rows["+exp=smoke up to its first step, data there"] = _times([there for _, there in first])
    notes = [
        "Medians of the wall's and of the processes' own CPU seconds, children included; processes "
        "are new, files are in the page cache.",
        "smoke: trainer.max_steps=1 and no evaluation; the model, data workers, one step, its "
        "checkpoint and weights are in it.",
    ]
    publish(Section("startup", rows, notes), out, threads=None)


def _times(runs: Sequence[tuple[float, float]]) -> dict[str, float | str]:
    wall, cpu = (statistics.median(values) for values in zip(*runs, strict=True))
    return {"seconds": wall, "CPU seconds": cpu}


def _run(words: Sequence[str], folder: str | None = None) -> tuple[float, float]:
    before, start = _children(), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*PROGRAM, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr[-500:]}")
    return time.perf_counter() - start, _children() - before


def _first_step() -> tuple[tuple[float, float], tuple[float, float]]:
    """A run of one step in an empty folder, then a second one beside its data."""
    with tempfile.TemporaryDirectory() as folder:
        made = _run((*SMOKE, "trainer.max_steps=1", "optim.schedule.warmup=0"), folder)
        other = ("name=again", "trainer.max_steps=1", "optim.schedule.warmup=0")
        there = _run((*SMOKE, *other), folder)
        lines = (Path(folder) / "runs/again/metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["step"] == 1
    return made, there


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
