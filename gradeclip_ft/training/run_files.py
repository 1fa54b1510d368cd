"""Files that a run leaves: their names, and how they are read after a crash. Needs no torch."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

CHECKPOINT = "last.ckpt"
WEIGHTS = "weights.safetensors"
BEST = "best.safetensors"
METRICS_JSONL = "metrics.jsonl"
METRICS_CSV = "metrics.csv"
OWN = (CHECKPOINT, WEIGHTS, BEST, METRICS_JSONL, METRICS_CSV, "config.yaml", "environment.json")
logger = logging.getLogger(__name__)


def older_checkpoints(folder: Path) -> list[Path]:
    """Kept checkpoints before the last one, newest first."""
    return sorted(folder.glob(f"step-{'[0-9]' * 8}.ckpt"), reverse=True)


def newest_good(folder: Path) -> Path | None:
    """The checkpoint to resume from; None without one. Damaged ones are skipped with a warning.

    Raises:
        ValueError: There are checkpoints, and all of them are damaged.
    """
    faults: list[str] = []
    found = (folder / CHECKPOINT, *older_checkpoints(folder))
    for path in filter(Path.exists, found):
        if (fault := damage(path)) is None:
            if faults:
                logger.warning("%s; resuming from %s", "; ".join(faults), path)
            return path
        faults.append(f"{path}: {fault}")
    if faults:
        raise ValueError(
            f"no checkpoint can be used: {'; '.join(faults)}. Copy a good one back, or start "
            "another run with name=..., from weights with init_from=FILE"
        )
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint or weights file; None if it can be read.

    A checkpoint is a zip archive whose parts carry checksums, so any change shows. The header of a
    .safetensors says how long the file is, so a cut shows.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):
                return None
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception as error:  # zipfile raises many kinds on arbitrary bytes
        return f"cut off or damaged ({error})"
    return None if part is None else f"damaged (checksum of {part})"


def step_of(weights: Path) -> int | None:
    """Step at which a run wrote these weights; None for files that are not of a run."""
    note = header(weights)
    return int(note["step"]) if "step" in note else None


def header(weights: Path) -> dict[str, str]:
    """Notes in the header of a .safetensors; empty for other files.

    Raises:
        ValueError: The file is damaged.
    """
    if weights.suffix != ".safetensors":
        return {}
    try:
        with safe_open(weights, framework="numpy") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{weights} is cut off or damaged ({error})") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; lines that a crash cut off are left out."""
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            found.append(row)
    return found


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written."""
    for path in folder.glob(".*"):
        if path.is_file() and path.name.startswith(tuple(f".{name}." for name in OWN)):
            path.unlink(missing_ok=True)
