"""Which checkpoints of a run are whole: names, sizes and hashes. Needs no torch.

`checkpoints.json` holds size and hash of the contents that were written completely. It knows them
by content, not by name, and learns of a file before the file gets its name: a crash between any
two operations leaves a folder in which every good file is known and no other one is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradeclip_ft.results.record import write_atomically

CHECKPOINT = "last.ckpt"
WEIGHTS = "weights.safetensors"
LEDGER = "checkpoints.json"
OLDER = re.compile(r"step-(\d{8,})\.ckpt")
logger = logging.getLogger(__name__)

Entries = dict[str, dict[str, Any]]


def older_name(step: int) -> str:
    """What `last.ckpt` is called when a newer one takes its place."""
    return f"step-{step:08d}.ckpt"


def older(folder: Path) -> list[Path]:
    """Kept checkpoints before the last one, newest first."""
    found = [path for path in folder.glob("step-*.ckpt") if OLDER.fullmatch(path.name)]
    return sorted(found, key=step_in_name, reverse=True)


def step_in_name(path: Path) -> int:
    """Step of a kept checkpoint."""
    found = OLDER.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def enter(folder: Path, files: dict[str, Path], *, step: int, room: int) -> None:
    """Note complete files, by the name they are going to have.

    Saves that were killed behind this leave entries of contents that never got a name; they may
    not push out what is on disk.

    Args:
        folder: Of the run.
        files: Where each is now.
        step: Optimiser steps behind them.
        room: Entries to keep, newest last; older ones only of contents on disk.
    """
    entries = _read(folder) or {}
    for name, path in files.items():
        entry = {"file": name, "step": step, "bytes": path.stat().st_size}
        digest = _digest(path)
        entries.pop(digest, None)
        entries[digest] = entry
    kept = _within(room, entries, folder)
    write_atomically(folder / LEDGER, json.dumps(kept, indent=1) + "\n")


def fault(path: Path) -> str | None:
    """Why a file of a run is not what was written; None for a good one.

    Runs without a ledger, of older versions, are taken as they are.
    """
    entries = _read(path.parent)
    if entries is None:
        return None
    size = path.stat().st_size
    if size not in {entry["bytes"] for entry in entries.values()}:
        return f"{size} bytes, which is no size that was written: cut off, or not of this run"
    if _digest(path) not in entries:
        return "its content is not what was written (hash in checkpoints.json): damaged"
    return None


def newest_good(folder: Path) -> Path | None:
    """The checkpoint to go on from; None where there is none. Damaged ones are named and passed.

    Raises:
        ValueError: There are checkpoints, and all of them are damaged.
    """
    faults: list[str] = []
    for path in _candidates(folder):
        reason = fault(path)
        if reason is None:
            if faults:
                logger.warning("%s; going on from %s", "; ".join(faults), path)
            return path
        faults.append(f"{path}: {reason}")
    if faults:
        raise ValueError(
            f"no checkpoint can be used: {'; '.join(faults)}. Copy a good one back, or start "
            "another run with name=..., from weights with init_from=FILE"
        )
    return None


def _candidates(folder: Path) -> Iterator[Path]:
    last = folder / CHECKPOINT
    if last.exists():
        yield last
    yield from older(folder)


def _within(room: int, entries: Entries, folder: Path) -> Entries:
    """The newest entries, and older ones of files that are there; hashes only those in doubt."""
    older_ones = dict(list(entries.items())[:-room])
    sizes = {entry["bytes"] for entry in older_ones.values()}
    there = [path for path in (folder / WEIGHTS, *_candidates(folder)) if path.exists()]
    present = {_digest(path) for path in there if path.stat().st_size in sizes}
    return {
        digest: entry
        for digest, entry in entries.items()
        if digest in present or digest not in older_ones
    }


def _read(folder: Path) -> Entries | None:
    path = folder / LEDGER
    if not path.exists():
        return None
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # a machine that lost power keeps names and loses contents
        logger.warning("%s cannot be read (%s); checkpoints are taken unchecked", path, error)
        return None


def _checked(content: Any) -> Entries:
    """Raises ValueError unless these are entries."""
    entries = content.values() if isinstance(content, dict) else [None]
    if not all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) for entry in entries
    ):
        raise ValueError("it holds other things than sizes by hash")
    return dict(content)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
