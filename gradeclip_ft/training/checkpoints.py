"""When a run saves what it goes on from, and what happens where that cannot be written."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from gradeclip_ft.training import ledger
from gradeclip_ft.training.ledger import CHECKPOINT, WEIGHTS
from gradeclip_ft.training.module import FineTuneModule

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


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OnSaveError = Literal["stop", "continue"]
logger = logging.getLogger(__name__)


class SaveError(RuntimeError):
    """A checkpoint cannot be written; those on disk are untouched."""


class Checkpoints(pl.Callback):
    """Saves every `every` steps, after the last, and when interrupted between two updates.

    Args:
        folder: Of the run.
        every: Steps between two checkpoints.
        keep: Checkpoints on disk: the last one and those before it.
        on_error: What a checkpoint that cannot be written does to the run. The one behind the last
            step ends it in any case.

    Attributes:
        on_error: As given.
        collect: Called by all processes before they save together; may be a collective.
    """

    def __init__(
        self, folder: Path, *, every: int, keep: int = 2, on_error: OnSaveError = "stop"
    ) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(
                f"checkpoint_every is {every}; give the steps between checkpoints, 1 or more"
            )
        if keep < 1:
            raise ValueError(f"keep is {keep}; a run needs 1 checkpoint or more to go on from")
        self._folder = folder
        self._every = every
        self._keep = keep
        self.on_error = on_error
        self.collect: Callable[[], None] = lambda: None
        self._good: Path | None = None
        self._saved: int | None = None
        self._tried: int | None = None  # the same on all processes, also where a save failed
        self._updating: int | None = None

    @property
    def last_good(self) -> str:
        """The checkpoint to go on from, in words."""
        if not self._saved:
            return "none yet"
        return f"{self._good} (step {self._saved})"

    def save(self, trainer: pl.Trainer) -> None:
        """Write both files for the current step. A collective: no process goes on before the end.

        Raises:
            SaveError: They cannot be written, and `on_error` is "stop".
        """
        self._tried = trainer.global_step
        self.collect()
        self._write(trainer, self.on_error)
        trainer.strategy.barrier("checkpoint")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something to save; a resumed run stands at its checkpoint."""
        self._saved = self._tried = trainer.global_step
        self._good = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        if trainer.is_global_zero:
            sweep(self._folder)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """The weights change until the step counts as done: nothing to save in between."""
        self._updating = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save where it is time, once per step."""
        step = trainer.global_step
        due = step % self._every == 0 or step == trainer.max_steps
        if due and step != self._tried:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a run that ended early, by a time limit for example, or whose disk was full."""
        if trainer.global_step != self._tried:
            self.collect()
        if self._ahead(trainer):
            self._write(trainer, "stop")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save the steps since the last checkpoint, unless an update was cut off half-way."""
        if self._ahead(trainer) and not isinstance(exception, SaveError):
            self._write(trainer, "continue")

    def _ahead(self, trainer: pl.Trainer) -> bool:
        return self._saved is not None and trainer.global_step not in (self._saved, self._updating)

    def _write(self, trainer: pl.Trainer, on_error: OnSaveError) -> None:
        """Write both files, on the first process; no collective."""
        step = trainer.global_step
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        _place_behind(state, batches=step * trainer.accumulate_grad_batches)
        if trainer.is_global_zero:
            module = trainer.lightning_module
            assert isinstance(module, FineTuneModule)
            weights = module.clip.model.state_dict()
            last = self._good == self._folder / CHECKPOINT
            try:
                write_both(
                    self._folder,
                    state,
                    weights,
                    step=step,
                    keep=self._keep,
                    before=self._saved if last else None,
                )
            except OSError as error:
                self._tell(error, step, on_error)
                return
        self._saved, self._good = step, self._folder / CHECKPOINT

    def _tell(self, error: OSError, step: int, on_error: OnSaveError) -> None:
        free = shutil.disk_usage(self._folder).free / 1e6
        what = (
            f"no checkpoint at step {step}: {error} ({free:,.0f} MB free in {self._folder}). "
            f"Last good checkpoint: {self.last_good}"
        )
        if on_error == "stop":
            raise SaveError(
                f"{what}. Make room and go on with resume=auto; trainer.keep=1 keeps one "
                "checkpoint, trainer.on_save_error=continue trains on without"
            ) from error
        logger.error("%s; training goes on", what)


def _place_behind(state: dict[str, Any], *, batches: int) -> None:
    """Count the batches of finished steps alone.

    The data of a resumed run begin behind these, so it must not believe to be inside a step: it
    would update behind the wrong batches.
    """
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if progress["current"]["ready"] != batches:
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, batches))
        progress["is_last_batch"] = False


def lives_through(trainer: pl.Trainer, error: OSError) -> bool:
    """Whether a run goes on although a file beside the checkpoints finds no room."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    owners = [callback for callback in callbacks if isinstance(callback, Checkpoints)]
    return error.errno in FULL and any(owner.on_error == "continue" for owner in owners)


BEST = "best.safetensors"


class Best:
    """Keeps the weights whose chosen metric is highest; of equal ones the first.

    The file says its metric, value and step, so a resumed run goes on from it.

    Args:
        folder: Of the run.
        metric: As the loggers name it, `EVALUATOR/METRIC`.
    """

    def __init__(self, folder: Path, metric: str) -> None:
        self._path = folder / BEST
        self._metric = metric

    def offer(
        self, numbers: Mapping[str, float], weights: Mapping[str, Tensor], *, step: int
    ) -> None:
        """Keep these weights if they are better than those on disk.

        Raises:
            ValueError: The evaluators do not measure the metric.
        """
        if self._metric not in numbers:
            raise ValueError(
                f"evaluation.best is {self._metric}, which no evaluator measures; choose from "
                f"{', '.join(sorted(numbers))}"
            )
        value = numbers[self._metric]
        before = self._value()
        if before is None or value > before:
            note = {"metric": self._metric, "value": repr(value)}
            write_weights(self._path, weights, step=step, note=note)

    def _value(self) -> float | None:
        """The metric of the weights on disk; None where they were chosen by another one."""
        if not self._path.is_file():
            return None
        with safe_open(self._path, framework="pt") as file:
            note: dict[str, str] = file.metadata() or {}
        return float(note["value"]) if note.get("metric") == self._metric else None
