"""How long things take: variants in turns, so that other work on the machine hits all alike."""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradeclip_ft.results.record import commit, versions

Rows = dict[str, dict[str, float | str]]
Variants = Mapping[str, Callable[[], object]]
INTRODUCTION = """# Speed

Every section is printed by the command above its table; the JSON file holds the same numbers. CPU
seconds are those of the process itself, one thread unless stated, so that other programs on the
machine do not enter; variants run in turns, ratios are medians over the rounds' own ratios.
"""


@dataclass(frozen=True)
class Turns:
    """Seconds of every variant, one number per round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of a variant."""
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, base: str) -> list[float]:
        """Seconds of a variant divided by another one's, round by round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return [mine / other for mine, other in pairs]

    def ratio(self, name: str, base: str) -> float:
        """Median of these."""
        return statistics.median(self.ratios(name, base))

    def spread(self, name: str, base: str) -> str:
        """Smallest and largest of these."""
        ratios = self.ratios(name, base)
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    def rows(self, pairs: Iterable[tuple[str, str]] = ()) -> Rows:
        """Seconds of every variant, then ratio and spread of each pair."""
        rows: Rows = {name: {"seconds": self.median(name)} for name in self.seconds}
        for name, base in pairs:
            ratio, rounds = self.ratio(name, base), self.spread(name, base)
            rows[f"{name} / {base}"] = {"ratio": ratio, "rounds": rounds}
        return rows


def in_turns(variants: Variants, rounds: int, now: Callable[[], float] | None = None) -> Turns:
    """Run every variant once per round, forwards and backwards in turn; the first is a warm-up."""
    now = now or time.process_time  # all threads of this process, no other program
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        order = list(variants.items())
        for name, run in order if number % 2 == 0 else reversed(order):
            start = now()
            run()
            if number >= 0:
                seconds[name].append(now() - start)
    return Turns(seconds)


def publish(
    title: str, rows: Rows, notes: Sequence[str], out: Path | None, threads: int | None = 1
) -> None:
    """Print a table; with `out`, enter it into OUT.json in place of its title, and write OUT.md."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    machine = names[0] if names else platform.machine()
    count = "" if threads is None else f", torch threads {threads}"
    entry = {
        "title": title,
        "rows": rows,
        "notes": list(notes),
        "command": f"python -m tools.bench {shlex.join(sys.argv[1:])}",
        "machine": f"{machine}{count}, {platform.system()}, Python {platform.python_version()}",
        "versions": {**versions(), "torch": torch.__version__},
        "commit": commit(),
    }
    print(markdown(entry))
    if out is None:
        return
    path = out.with_suffix(".json")
    sections = json.loads(path.read_text()) if path.is_file() else []
    sections = [old for old in sections if old["title"] != title] + [entry]
    sections.sort(key=lambda section: str(section["title"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sections, indent=1, ensure_ascii=False) + "\n")
    out.with_suffix(".md").write_text("\n".join([INTRODUCTION, *map(markdown, sections)]))


def markdown(entry: Mapping[str, Any]) -> str:
    """A section."""
    columns = list(dict.fromkeys(column for row in entry["rows"].values() for column in row))
    lines = [f"## {entry['title']}", "", "```bash", entry["command"], "```", ""]
    lines += [f"| | {' | '.join(columns)} |", f"|--|{'--|' * len(columns)}"]
    for name, row in entry["rows"].items():
        values = [row.get(column, "") for column in columns]
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    packages = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    facts = [*entry["notes"], f"{entry['machine']}; {packages}; commit {entry['commit']}."]
    return "\n".join([*lines, "", *(f"- {fact}" for fact in facts), ""])
