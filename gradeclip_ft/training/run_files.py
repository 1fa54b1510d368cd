"""What a run goes on from: `last.ckpt` (full state), `weights.safetensors` (open_clip's keys).

Both are complete before either takes its name, and `checkpoints.json` knows them by size and hash
before that, so a crash at any byte leaves a good checkpoint, and a damaged one is found out. The
weights are renamed first: after a crash in between they are a checkpoint newer, never older, and
the resumed run writes them again.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gradeclip_ft.training import ledger
from gradeclip_ft.training.ledger import CHECKPOINT, WEIGHTS

OURS = (CHECKPOINT, WEIGHTS, ledger.LEDGER, "metrics.jsonl", "metrics.csv")


def write_both(
    folder: Path,
    state: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    step: int,
    keep: int = 1,
    before: int | None = None,
) -> None:
    """Replace checkpoint and weights in `folder`; both are complete before either is replaced.

    Args:
        folder: Of the run.
        state: Full state.
        weights: In open_clip's names.
        step: Optimiser steps behind them.
        keep: Checkpoints to have on disk afterwards.
        before: Step of the present `last.ckpt`; None if it is not worth keeping.
    """
    writers: dict[Path, Callable[[Path], None]] = {
        folder / WEIGHTS: _weights_writer(weights, step, {}),
        folder / CHECKPOINT: lambda path: _save_state(state, path),
    }

    def enter(written: dict[str, Path]) -> None:
        ledger.enter(folder, written, step=step, room=2 * (keep + 1))
        if keep > 1 and before is not None and (folder / CHECKPOINT).exists():
            (folder / CHECKPOINT).replace(folder / ledger.older_name(before))

    _write_all(writers, enter)
    for path in ledger.older(folder)[keep - 1 :]:
        path.unlink()


def write_weights(
    path: Path, weights: Mapping[str, Tensor], *, step: int, note: Mapping[str, str]
) -> None:
    """Replace one weights file.

    Args:
        path: The file.
        weights: In open_clip's names.
        step: Optimiser steps behind them.
        note: More for the head of the file.
    """
    _write_all({path: _weights_writer(weights, step, note)})


def step_of(weights: Path) -> int | None:
    """Step that a weights file of a run was written at; None for other files."""
    with safe_open(weights, framework="pt") as file:
        note: dict[str, str] = file.metadata() or {}
    return int(note["step"]) if "step" in note else None


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written."""
    for path in folder.glob(".*"):
        if path.is_file() and path.name.startswith(tuple(f".{name}." for name in OURS)):
            path.unlink(missing_ok=True)


def _weights_writer(
    weights: Mapping[str, Tensor], step: int, note: Mapping[str, str]
) -> Callable[[Path], None]:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    metadata = {"format": "pt", "step": str(step), **note}

    def write(path: Path) -> None:
        try:
            save_file(tensors, path, metadata=metadata)
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            raise OSError(int(found[1]) if found else errno.EIO, str(error), str(path)) from error

    return write


def _save_state(state: Mapping[str, Any], path: Path) -> None:
    """Through a file of Python, whose error torch hides behind one of its own."""
    try:
        with path.open("wb") as file:
            torch.save(dict(state), file)
    except RuntimeError as error:
        cause = error.__context__
        code = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
        raise OSError(code, str(cause or error), str(path)) from error


def _write_all(
    writers: Mapping[Path, Callable[[Path], None]],
    written: Callable[[dict[str, Path]], None] = lambda files: None,
) -> None:
    """Write all files aside, hand them to `written`, then rename them."""
    asides = {final: final.parent / f".{final.name}.{os.getpid()}" for final in writers}
    try:
        for final, write in writers.items():
            final.parent.mkdir(parents=True, exist_ok=True)
            write(asides[final])
            _flush(asides[final])
        written({final.name: aside for final, aside in asides.items()})
        for final, aside in asides.items():
            aside.replace(final)
            _flush_names(final.parent)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Bytes on the disk before the name points to them; readable as other files of a run are."""
    path.chmod(0o644)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_names(folder: Path) -> None:
    """The renaming itself on the disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
