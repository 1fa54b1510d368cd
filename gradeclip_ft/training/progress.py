"""What a user sees of the steps: a bar in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from gradeclip_ft.training.callbacks import Record

SHOWN = ("loss", "global", "local", "samples_per_second")


def progress(record: Record) -> pl.Callback:
    """The bar if standard output is a terminal, else the lines."""
    return Bar(record) if sys.stdout.isatty() else Lines(record)


class Bar(RichProgressBar):
    """Lightning's bar with the losses and samples per second of the last recorded step."""

    def __init__(self, record: Record) -> None:
        super().__init__(refresh_rate=10)
        self._record = record

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Numbers behind the bar."""
        return {name: self._record.latest[name] for name in SHOWN if name in self._record.latest}

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"  # to Lightning the run is one epoch


class Lines(pl.Callback):
    """One line of text per recorded step, on the first process."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._shown = 0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Print what was recorded in this step."""
        if not trainer.is_global_zero or self._record.step == self._shown:
            return
        self._shown = self._record.step
        numbers = self._record.latest
        losses = "  ".join(f"{name} {numbers[name]:.4f}" for name in SHOWN[:3] if name in numbers)
        speed = f"{numbers['samples_per_second']:.0f} samples/s"
        print(f"step {trainer.global_step}/{trainer.max_steps}  {losses}  {speed}", flush=True)
