"""When a run saves what it resumes from, and what happens when that cannot be written."""

from __future__ import annotations

import errno
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from gradeclip_ft.results.record import replace_files
from gradeclip_ft.training.detector import DetectorModule
from gradeclip_ft.training.module import FineTuneModule
from gradeclip_ft.training.run_files import (
    BEST,
    CHECKPOINT,
    WEIGHTS,
    damage,
    header,
    older_checkpoints,
    sweep,
)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OnSaveError = Literal["stop", "continue"]
logger = logging.getLogger(__name__)


class SaveError(RuntimeError):
    """A checkpoint cannot be written; those on disk are untouched."""


def sizes(module: pl.LightningModule) -> tuple[int, int]:
    """Bytes of one checkpoint, with AdamW's two moments of what learns, and of the weights."""

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    assert isinstance(module, FineTuneModule | DetectorModule)
    learning = size(parameter for parameter in module.parameters() if parameter.requires_grad)
    weights = size(module.clip.model.state_dict().values())
    return size(module.state_dict().values()) + 2 * learning, weights


def require_room(folder: Path, module: pl.LightningModule, settings: Mapping[str, Any]) -> str:
    """What the run will keep on disk, in words.

    Args:
        folder: Of the run; it need not exist.
        module: What is trained.
        settings: `keep` and `on_save_error` of the trainer.

    Raises:
        ValueError: There is not room for it all, and a checkpoint that cannot be written ends the
            run.
    """
    checkpoint, weights = sizes(module)
    keep, there = settings["keep"], folder.absolute()
    while not there.is_dir():
        there = there.parent
    free = shutil.disk_usage(there).free
    # Each file is complete beside the one that it replaces before that goes.
    own = (folder / CHECKPOINT, folder / WEIGHTS, *older_checkpoints(folder))
    present = sum(path.stat().st_size for path in own if path.is_file())
    needed = (keep + 1) * checkpoint + 2 * weights
    kept = "1 checkpoint" if keep == 1 else f"{keep} checkpoints"
    text = (
        f"{kept} of {in_words(checkpoint)} and weights of {in_words(weights)} in {folder}, "
        f"{in_words(needed)} while they are written; {in_words(free)} free"
    )
    if needed > free + present and settings["on_save_error"] == "stop":
        raise ValueError(
            f"no room on the disk: {text}. Make room, choose another runs_dir=, or set "
            "trainer.keep=1"
        )
    return text


def in_words(size: int) -> str:
    """Bytes as people read them.

    >>> in_words(1_830_000_000), in_words(7_400_000)
    ('1.8 GB', '7.4 MB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@dataclass(eq=False)
class Checkpoints(pl.Callback):
    """Saves every `every` steps, after the last, and when interrupted between two updates.

    Attributes:
        folder: Of the run.
        collect: Called by all processes before they save together; may be a collective.
        every: Steps between two checkpoints.
        keep: Checkpoints on disk: the last one and those before it.
        on_error: What a checkpoint that cannot be written does to the run. The one after the last
            step ends it in any case.
    """

    folder: Path
    collect: Callable[[], None]
    every: int
    keep: int = 2
    on_error: OnSaveError = "stop"

    def __post_init__(self) -> None:
        for name, value in (("checkpoint_every", self.every), ("keep", self.keep)):
            if value < 1:
                raise ValueError(f"trainer.{name} is {value}; give 1 or more")
        self._good: Path | None = None
        self._saved: int | None = None
        self._tried: int | None = None  # the same on all processes, also where a save failed
        self._updating: int | None = None

    @property
    def last_good(self) -> str:
        """The checkpoint to resume from, in words."""
        return f"{self._good} (step {self._saved})" if self._saved else "none yet"

    def save(self, trainer: pl.Trainer) -> None:
        """Write both files for the current step. A collective: no process returns before the end.

        Raises:
            SaveError: They cannot be written, and `on_error` is "stop".
        """
        self._tried = trainer.global_step
        self.collect()
        self._write(trainer, self.on_error)
        trainer.strategy.barrier("checkpoint")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something to save; a resumed run is at its checkpoint."""
        self._saved = self._tried = trainer.global_step
        self._good = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        if trainer.is_global_zero:
            sweep(self.folder)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """The weights change until the step counts as done: nothing to save in between."""
        self._updating = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Save when it is time, once per step."""
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps
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
        """Write both files, on the first process; not a collective."""
        step = trainer.global_step
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        # The data of a resumed run begin after the batches of finished steps. Its loop must not
        # believe to be inside a step, or it would update after the wrong batches.
        batches = step * trainer.accumulate_grad_batches
        progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if progress["current"]["ready"] != batches:
            for counts in (progress["total"], progress["current"]):
                counts.update(dict.fromkeys(counts, batches))
            progress["is_last_batch"] = False
        if trainer.is_global_zero:
            module = trainer.lightning_module
            assert isinstance(module, FineTuneModule | DetectorModule)
            last = self._good == self.folder / CHECKPOINT
            try:
                write_both(
                    self.folder,
                    state,
                    module.clip.model.state_dict(),
                    step=step,
                    keep=self.keep,
                    before=self._saved if last else None,
                )
            except OSError as error:
                free = shutil.disk_usage(self.folder).free / 1e6
                what = (
                    f"no checkpoint at step {step}: {error} ({free:,.0f} MB free in "
                    f"{self.folder}). Last good checkpoint: {self.last_good}"
                )
                if on_error == "stop":
                    raise SaveError(
                        f"{what}. Make room and continue with resume=auto; trainer.keep=1 keeps "
                        "one checkpoint, trainer.on_save_error=continue trains on without"
                    ) from error
                logger.error("%s; training continues", what)
                return
        self._saved, self._good = step, self.folder / CHECKPOINT


@contextmanager
def tolerating_full_disk(trainer: pl.Trainer, what: str) -> Iterator[None]:
    """Log the loss of a file that finds no room on the disk, where training is to continue."""
    try:
        yield
    except OSError as error:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        owners = [callback for callback in callbacks if isinstance(callback, Checkpoints)]
        if error.errno not in FULL or all(owner.on_error == "stop" for owner in owners):
            raise
        logger.error("%s of step %d are lost: %s", what, trainer.global_step, error)


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
        weights: Of a CLIP, in open_clip's names; of a detector, in its own.
        step: Optimiser steps that led to them.
        keep: Checkpoints to have on disk afterwards.
        before: Step of the present `last.ckpt`; None if it is not worth keeping.
    """
    last = folder / CHECKPOINT

    def keep_the_one_before() -> None:
        if keep > 1 and before is not None and last.exists():
            last.replace(folder / f"step-{before:08d}.ckpt")

    writers: dict[Path, Callable[[Path], None]] = {
        folder / WEIGHTS: lambda path: _save_weights(weights, path, {"step": str(step)}),
        last: lambda path: _save_state(state, path),
    }
    replace_files(writers, keep_the_one_before)
    for path in older_checkpoints(folder)[keep - 1 :]:
        path.unlink()


def keep_best(
    folder: Path,
    metric: str,
    numbers: Mapping[str, float],
    weights: Mapping[str, Tensor],
    *,
    step: int,
) -> None:
    """Keep these weights as `best.safetensors` if their metric is higher than before.

    The file holds its metric, value and step, so a resumed run continues from it.

    Raises:
        ValueError: The evaluators do not measure the metric.
    """
    if metric not in numbers:
        raise ValueError(
            f"evaluation.best is {metric}, which no evaluator measures; choose from "
            f"{', '.join(sorted(numbers))}"
        )
    path = folder / BEST
    kept = header(path) if path.is_file() and damage(path) is None else {}
    if kept.get("metric") != metric or numbers[metric] > float(kept["value"]):
        note = {"step": str(step), "metric": metric, "value": repr(numbers[metric])}
        replace_files({path: lambda aside: _save_weights(weights, aside, note)})


def _save_weights(weights: Mapping[str, Tensor], path: Path, note: Mapping[str, str]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt", **note})
    except SafetensorError as error:  # hides the system's error in its text
        found = re.search(r"os error (\d+)", str(error))
        raise OSError(int(found[1]) if found else errno.EIO, str(error), str(path)) from error


def _save_state(state: Mapping[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:  # of Python: torch then keeps the system's error as context
            torch.save(dict(state), file)
    except RuntimeError as error:
        cause = error.__context__
        code = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
        raise OSError(code, str(cause or error), str(path)) from error
