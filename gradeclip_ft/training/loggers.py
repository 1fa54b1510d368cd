"""Where metrics go: `metrics.jsonl` and `metrics.csv` always, Weights & Biases on request.

Lightning calls loggers on the first process only.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from gradeclip_ft.results.masking import masked
from gradeclip_ft.results.record import write_atomically
from gradeclip_ft.training.run_files import METRICS_CSV, METRICS_JSONL, read_lines


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
        numbers = {
            name: float(value) if math.isfinite(value) else None for name, value in metrics.items()
        }
        row = {"step": step, **numbers}
        self._folder.mkdir(parents=True, exist_ok=True)
        _append(self._folder / METRICS_JSONL, json.dumps(row) + "\n")
        if row.keys() <= set(self._columns):
            _append(self._folder / METRICS_CSV, _csv(self._columns, [row]))
        else:
            self._rewrite_table()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's `config.yaml` holds them."""

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drop lines after a checkpoint's step, which a resumed run writes again."""
        path = self._folder / METRICS_JSONL
        if path.exists():
            kept = [json.dumps(line) for line in read_lines(path) if line["step"] <= step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))
            self._rewrite_table()

    def _rewrite_table(self) -> None:
        rows = read_lines(self._folder / METRICS_JSONL)
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        write_atomically(self._folder / METRICS_CSV, _csv(self._columns, rows, header=True))


class OptionalWandbLogger(WandbLogger):
    """Lightning's logger for Weights & Biases; an error there ends the logging, never the run."""

    _broken = False

    @property
    def experiment(self) -> Any:
        """The run there, begun at the first call; None after an error."""
        return self._try(lambda: super(OptionalWandbLogger, self).experiment)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send the metrics of one step."""
        self._try(lambda: super(OptionalWandbLogger, self).log_metrics(metrics, step))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run there, so that the next job of a sweep begins its own."""
        if self._experiment is not None:
            self._try(lambda: self.experiment.finish(exit_code=0 if status == "success" else 1))

    def _try(self, action: Callable[[], Any]) -> Any:
        if self._broken:
            return None
        try:
            return action()
        except Exception as error:  # a tracker must not end a run of days
            if not self._broken:
                self._broken = True
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"Weights & Biases failed ({masked(reason)}); nothing more is sent. "
                    "metrics.jsonl and metrics.csv are complete; WANDB_MODE=offline needs no "
                    "network",
                    stacklevel=2,
                )
            return None


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
        mode: "offline" stores below `folder`, for `wandb sync`; None leaves it to WANDB_MODE.
        entity: User or team; the account's own if None.
        extra: Further arguments of `wandb.init`.
    """
    path = folder / "wandb" / "id"  # a resumed run finds it again, another of this name does not
    if not path.exists() or not path.read_text(encoding="utf-8").strip():
        write_atomically(path, uuid.uuid4().hex[:12])
    settings: dict[str, Any] = {
        "project": project,
        "entity": entity,
        "save_dir": folder,
        "name": folder.name,
        "id": path.read_text(encoding="utf-8"),
        "config": dict(config),
        **({} if mode is None else {"mode": mode}),
        **(extra or {}),
    }
    return [FileLogger(folder), OptionalWandbLogger(**settings)]


def _append(path: Path, line: str) -> None:
    """Add a whole line, or nothing where the disk is full."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(line)
    except OSError:
        os.truncate(path, size)
        raise


def _csv(columns: list[str], rows: Iterable[dict[str, Any]], *, header: bool = False) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
