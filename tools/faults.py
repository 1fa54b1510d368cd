"""Injects every fault that runs are meant to survive, and prints what happened.

    python -m tools.faults                     all, in about a minute
    python -m tools.faults data out=table.md   one part: data, remote, safety, or numbers (with
                                               the tracker)

Exit code 1 if a fault is not handled: lost more than it must, stopped what should go on, or was let
through. docs/faults.md holds the printed table.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gradeclip_ft.commands.cli import call
from gradeclip_ft.commands.config import perform, wants_traceback
from tools import faults_data, faults_remote, faults_safety, faults_training
from tools.faults_data import Row

LONGEST = 150
PARTS: dict[str, tuple[str, Callable[[Path], Iterator[Row]]]] = {
    "data": ("Data", faults_data.rows),
    "remote": ("Remote shards", faults_remote.rows),
    "numbers": ("Numbers and tracker", faults_training.rows),
    "safety": ("Safety", faults_safety.rows),
}


def faults(*parts: str, out: Path | None = None) -> int:
    """Inject and print; see the module.

    out=   also write the table to this file
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"{unknown[0]}: there is {', '.join(PARTS)}")
    lines: list[str] = []
    total = unhandled = 0
    begun = time.perf_counter()
    for title, rows in (PARTS[part] for part in parts or PARTS):
        lines += [
            f"### {title}",
            "",
            "| fault | outcome | lost samples | message |",
            "|--|--|--|--|",
        ]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "f"
            if rows is not faults_safety.rows:
                folder.mkdir()
            for row in rows(folder):
                total, unhandled = total + 1, unhandled + (not row.handled)
                lines.append(_line(row, place))
                print(lines[-1], flush=True)
        lines.append("")
    lines.append(f"{total} faults, {unhandled} unhandled.")
    print(f"{lines[-1]} {time.perf_counter() - begun:.0f} s")
    if out is not None:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if unhandled else 0


def _line(row: Row, place: str) -> str:
    message = " ".join(row.message.replace(place, "...").split()).replace("|", "\\|")
    message = message.replace("<", "&lt;")
    message = message if len(message) <= LONGEST else f"{message[: LONGEST - 3]}..."
    outcome = row.outcome if row.handled else f"**UNHANDLED** ({row.outcome})"
    return f"| {row.fault.replace('<', '&lt;')} | {outcome} | {row.lost} | {message} |"


if __name__ == "__main__":
    sys.exit(perform(lambda: call(faults, sys.argv[1:]), full=wants_traceback()))
