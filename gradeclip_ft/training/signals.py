"""A clean end on SIGTERM or SIGUSR1: every process stops behind the same step, which is saved.

Lightning broadcasts from inside its signal handler, which hangs where a process stands in another
collective. Here a handler only takes a note; the notes are compared once per step.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from gradeclip_ft.ops.distributed import anywhere
from gradeclip_ft.ops.stop_signals import SIGNALS
from gradeclip_ft.training.checkpoints import Checkpoints

INTERRUPTED = 143  # exit code of a program that ended on SIGTERM


class StopOnSignal(pl.Callback):
    """Saves and leaves behind the step in which any process got a signal."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._received = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over from Lightning, which puts back what was there before training."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Where a step is finished, compare notes; a collective.

        Raises:
            SystemExit: Any process got a signal; the step is saved.
        """
        finished = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if finished and anywhere(self._received, pl_module.device):
            self._checkpoints.save(trainer)
            raise SystemExit(INTERRUPTED)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True
