"""Where metrics go: `metrics.jsonl` and `metrics.csv` always, Weights & Biases on request.

Lightning calls loggers on the first process only.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from gradeclip_ft.results.masking import masked
from gradeclip_ft.results.record import write_atomically

JSONL = "metrics.jsonl"
CSV = "metrics.csv"


class FileLogger(Logger):
    """One line per logged step in `metrics.jsonl`, and the same as a table in `metrics.csv`.

    The lines are the record; the table is made anew whenever a metric appears for the first time.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """Name of the run."""
        return self._folder.name

    @property
    def version(self) -> str:
        """Not used: a run has one folder."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line; values that are not finite become null."""
        row = {"step": step, **{name: _number(value) for name, value in metrics.items()}}
        self._folder.mkdir(parents=True, exist_ok=True)
        _append(self._folder / JSONL, json.dumps(row) + "\n")
        if set(row) <= set(self._columns):
            _append(self._folder / CSV, _table([row], self._columns))
        else:
            self._rewrite_table()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's `config.yaml` holds them."""

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drop lines behind a checkpoint's step, which a resumed run writes again."""
        path = self._folder / JSONL
        if not path.exists():
            return
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._rewrite_table()

    def _rewrite_table(self) -> None:
        rows = read_lines(self._folder / JSONL)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        header = _table([dict(zip(columns, columns, strict=True))], columns)
        write_atomically(self._folder / CSV, header + _table(rows, columns))
        self._columns = columns


class WandbLogger(Logger):
    """Sends metrics to Weights & Biases; a failure there ends the sending, never the run."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self._settings = dict(settings)
        self._run: Any = None
        self._broken = False

    @property
    def name(self) -> str:
        """Project in Weights & Biases."""
        return str(self._settings["project"])

    @property
    def version(self) -> str:
        """Name of the run."""
        return str(self._settings["name"])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send the metrics of one step."""
        self._try(lambda run: run.log({**metrics, "step": step}))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is sent at the start."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run there, so that the next job of a sweep begins its own."""
        if self._run is not None:
            self._try(lambda run: run.finish(exit_code=0 if status == "success" else 1))
            self._run = None

    def _try(self, action: Callable[[Any], Any]) -> None:
        if self._broken:
            return
        try:
            if self._run is None:
                self._run = _start_wandb(self._settings)
            action(self._run)
        except Exception as error:  # a tracker must not end a run of days
            self._broken = True
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"Weights & Biases failed ({masked(reason)}); nothing more is sent. "
                f"{JSONL} and {CSV} are complete; WANDB_MODE=offline needs no network",
                stacklevel=2,
            )


def files(folder: Path, config: Mapping[str, Any]) -> list[Logger]:
    """The two files alone."""
    return [FileLogger(folder)]


def files_and_wandb(
    folder: Path,
    config: Mapping[str, Any],
    *,
    project: str = "gradeclip_ft",
    mode: Literal["online", "offline", "disabled"] | None = None,
    entity: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> list[Logger]:
    """The two files and Weights & Biases.

    Args:
        folder: Of the run; its name is the name of the run there, and resuming continues it.
        config: Sent along as the run's configuration.
        project: Project in Weights & Biases.
        mode: "offline" stores below `folder`, for `wandb sync`; None: as WANDB_MODE says.
        entity: User or team; the account's own if None.
        extra: Further arguments of `wandb.init`.

    Where wandb is not installed, a warning says so and the files alone are written.
    """
    if importlib.util.find_spec("wandb") is None:
        warnings.warn(
            "logger=wandb needs the package wandb, which is not installed; nothing is sent. "
            f"{JSONL} and {CSV} are complete; pip install 'gradeclip_ft[wandb]'",
            stacklevel=2,
        )
        return [FileLogger(folder)]
    settings = {
        "project": project,
        "mode": mode,
        "entity": entity,
        "dir": str(folder),
        "name": folder.name,
        "id": _wandb_id(folder),
        "resume": "allow",
        "config": dict(config),
        **(extra or {}),
    }
    return [FileLogger(folder), WandbLogger(settings)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; a last line that a crash cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def _append(path: Path, text: str) -> None:
    """Add whole lines, or nothing where the disk is full."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError:
        os.truncate(path, size)
        raise


def _wandb_id(folder: Path) -> str:
    """Identifier that a resumed run finds again and no other run of that name has."""
    path = folder / "wandb" / "id"
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8")


def _start_wandb(settings: Mapping[str, Any]) -> Any:
    import wandb  # an extra: present only where asked for

    run = wandb.init(**settings)
    run.define_metric("*", step_metric="step")
    return run


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, restval="", lineterminator="\n")
    writer.writerows(rows)
    return text.getvalue()


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
