"""What a run goes on from: `last.ckpt` (full state), `weights.safetensors` (open_clip's keys).

Both are of the same step and replaced by renaming, so a crash at any moment leaves usable files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from gradeclip_ft.training.module import FineTuneModule

CHECKPOINT = "last.ckpt"
WEIGHTS = "weights.safetensors"


class Checkpoints(Checkpoint):
    """Saves every `every` steps, after the last, and when interrupted between two updates.

    Args:
        folder: Of the run.
        every: Steps between two checkpoints.
    """

    def __init__(self, folder: Path, *, every: int) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(
                f"checkpoint_every is {every}; give the steps between checkpoints, 1 or more"
            )
        self._folder = folder
        self._every = every
        self._saved: int | None = None
        self._updating: int | None = None

    @property
    def last_good(self) -> str:
        """The checkpoint to go on from, in words."""
        if not self._saved:
            return "none yet"
        return f"{self._folder / CHECKPOINT} (step {self._saved})"

    def save(self, trainer: pl.Trainer) -> None:
        """Write both files for the current step; no collective, so one process alone can do it."""
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if trainer.is_global_zero:
            module = trainer.lightning_module
            assert isinstance(module, FineTuneModule)
            write_both(
                self._folder, state, module.clip.model.state_dict(), step=trainer.global_step
            )
        self._saved = trainer.global_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something to save; a resumed run stands at its checkpoint."""
        self._saved = trainer.global_step

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
        """Save where it is time."""
        step = trainer.global_step
        due = step % self._every == 0 or step == trainer.max_steps
        if due and step != self._saved:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a run that ended early, by a time limit for example."""
        self._save_if_ahead(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save the steps since the last checkpoint, unless an update was cut off half-way."""
        self._save_if_ahead(trainer)

    def _save_if_ahead(self, trainer: pl.Trainer) -> None:
        if self._saved is not None and trainer.global_step not in (self._saved, self._updating):
            self.save(trainer)


def write_both(
    folder: Path, state: Mapping[str, Any], weights: Mapping[str, Tensor], *, step: int
) -> None:
    """Replace checkpoint and weights in `folder`; both are complete before either is replaced."""
    writers: dict[Path, Callable[[Path], None]] = {
        folder / WEIGHTS: _weights_writer(weights, step, {}),
        folder / CHECKPOINT: lambda path: torch.save(dict(state), path),
    }
    _write_all(writers)


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


def _weights_writer(
    weights: Mapping[str, Tensor], step: int, note: Mapping[str, str]
) -> Callable[[Path], None]:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    metadata = {"format": "pt", "step": str(step), **note}
    return lambda path: save_file(tensors, path, metadata=metadata)


def _write_all(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write all files aside, then rename them."""
    written: list[tuple[Path, Path]] = []
    try:
        for final, write in writers.items():
            final.parent.mkdir(parents=True, exist_ok=True)
            aside = final.parent / f".{final.name}.{os.getpid()}"
            written.append((aside, final))
            write(aside)
            _flush(aside)
        for aside, final in written:
            aside.replace(final)
    finally:
        for aside, _ in written:
            aside.unlink(missing_ok=True)


def step_of(weights: Path) -> int | None:
    """Step that a weights file of a run was written at; None for other files."""
    with safe_open(weights, framework="pt") as file:
        note: dict[str, str] = file.metadata() or {}
    return int(note["step"]) if "step" in note else None


def _flush(path: Path) -> None:
    """Bytes on the disk before the name points to them; readable as other files of a run are."""
    path.chmod(0o644)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
