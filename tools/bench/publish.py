"""Where figures go: a table on the screen, and a section of one JSON and one Markdown file."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gradeclip_ft.results.record import commit, versions

INTRODUCTION = """# Speed

Every section stands beside the command that printed it; the JSON file holds the same numbers. CPU
seconds are those of the process itself, one thread unless stated, so that other programs on the
machine do not enter; variants run in turns, ratios are medians over the rounds' own ratios.
"""


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: What was measured; a later section of the same title replaces this one.
        rows: By name of the row, a value per column.
        notes: What a reader must know.
    """

    title: str
    rows: Mapping[str, Mapping[str, float | str]]
    notes: Sequence[str] = ()


def publish(section: Section, out: Path | None, *, threads: int | None) -> None:
    """Print a section; with `out`, enter it into OUT.json and write OUT.md anew."""
    entry = {
        **asdict(section),
        "command": f"python -m tools.bench {shlex.join(sys.argv[1:])}",
        "machine": _machine(threads),
        "versions": versions(),
        "commit": commit(),
    }
    print(_markdown(entry))
    if out is None:
        return
    path = out.with_suffix(".json")
    sections = json.loads(path.read_text()) if path.is_file() else []
    kept = [old for old in sections if old["title"] != section.title]
    sections = sorted([*kept, entry], key=lambda one: str(one["title"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sections, indent=1, ensure_ascii=False) + "\n")
    text = "\n".join([INTRODUCTION, *map(_markdown, sections)])
    out.with_suffix(".md").write_text(text)


def _machine(threads: int | None) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    count = "" if threads is None else f", torch threads {threads}"
    return f"{device}{count}, {platform.system()}, Python {platform.python_version()}"


def _processor() -> str:
    """Name of the CPU, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _markdown(entry: Mapping[str, object]) -> str:
    rows = entry["rows"]
    assert isinstance(rows, Mapping)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"## {entry['title']}", "", "```bash", str(entry["command"]), "```", ""]
    lines += [f"| | {' | '.join(columns)} |", f"|--|{'--|' * len(columns)}"]
    for name, row in rows.items():
        cells = (_cell(row.get(column, "")) for column in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    found = entry["versions"]
    assert isinstance(found, Mapping)
    packages = ", ".join(f"{name} {version}" for name, version in found.items())
    notes = entry["notes"]
    assert isinstance(notes, Sequence)
    facts = [*notes, f"{entry['machine']}; {packages}; commit {entry['commit']}."]
    return "\n".join([*lines, "", *(f"- {note}" for note in facts), ""])


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
