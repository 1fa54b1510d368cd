"""What happens around the steps: metrics of all processes are collected and recorded."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.training.checkpoints import lives_through
from gradeclip_ft.training.data_module import CaptionDataModule
from gradeclip_ft.training.guard import StopOnNonFinite, gather
from gradeclip_ft.training.loggers import FileLogger

logger = logging.getLogger(__name__)


class Record(pl.Callback):
    """Collects the metrics of all processes and hands them to the loggers every `every` steps.

    Attributes:
        latest: Metrics of the last recorded step.
        step: That step.
    """

    def __init__(self, guard: StopOnNonFinite, *, every: int) -> None:
        if every < 1:
            raise ValueError(
                f"log_every is {every}; give the number of steps between lines, 1 or more"
            )
        self.latest: dict[str, float] = {}
        self.step = 0
        self._guard = guard
        self._every = every
        # skipped samples: up to the checkpoint and in all, all processes; since then, this process
        self._before: Counter[str] = Counter()
        self._total: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()  # of these, those of finished steps
        self._gathered: Counter[str] = Counter()  # of these, those in the total
        self._images = 0
        self._seconds = 0.0
        self._waited = 0.0
        self._begun = 0.0
        self._rate = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run writes the lines behind its checkpoint again."""
        for receiver in trainer.loggers:
            if isinstance(receiver, FileLogger):
                receiver.forget_after(trainer.global_step)

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: CaptionBatch,
        batch_idx: int,
    ) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the learning rate before the schedule moves on."""
        self._rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: CaptionBatch,
        batch_idx: int,
    ) -> None:
        """Count; every `every` steps, and at the last one, record."""
        self._seconds += time.perf_counter() - self._begun
        self._images += len(batch.images)
        self._skipped.update(batch.skipped)
        step = trainer.global_step
        finished = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if finished:
            self._finished = self._skipped.copy()
        if finished and (step % self._every == 0 or step == trainer.max_steps):
            self._record(trainer, outputs["metrics"], outputs["loss"])

    def _record(self, trainer: pl.Trainer, parts: Mapping[str, Any], loss: Tensor) -> None:
        data = getattr(trainer, "datamodule", None)
        waited = data.seconds_waited if isinstance(data, CaptionDataModule) else 0.0
        own = {
            "loss": float(loss) * trainer.accumulate_grad_batches,
            **{name: float(value) for name, value in parts.items()},
            "data_seconds": waited - self._waited,
            "seconds": self._seconds + waited - self._waited,
        }
        gathered = gather((own, dict(self._finished), self._images))
        means = {name: sum(each[0][name] for each in gathered) / len(gathered) for name in own}
        self._add_up([each[1] for each in gathered])
        self.latest = {
            **means,
            "samples_per_second": sum(each[2] for each in gathered) / max(means["seconds"], 1e-9),
            "gradient_norm": float(self._guard.gradient_norm),
            "learning_rate": self._rate,
            "left_out_steps": float(self._guard.left_out),
            "skipped": float(self._total.total()),
            **{f"skipped/{cause}": float(count) for cause, count in sorted(self._total.items())},
        }
        self._images, self._seconds, self._waited = 0, 0.0, waited
        self.step = trainer.global_step
        log(trainer, self.latest)

    def collect(self) -> None:
        """Bring the skipped samples of all processes together. A collective."""
        self._add_up(gather(dict(self._finished)))

    def _add_up(self, skipped: Sequence[Mapping[str, int]]) -> None:
        self._total = sum((Counter(each) for each in skipped), self._before.copy())
        self._gathered = self._finished.copy()

    def state_dict(self) -> dict[str, Any]:
        """Samples skipped in all finished steps; enters the checkpoint.

        Of other processes those since they were last gathered are missing; a save that all take
        part in gathers first.
        """
        return {"skipped": dict(self._total + (self._finished - self._gathered))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting where the interrupted run stopped."""
        self._before = Counter(state_dict["skipped"])
        self._total = self._before.copy()


def log(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Hand metrics of the current step to every logger; loggers write on the first process only."""
    for receiver in trainer.loggers:
        try:
            receiver.log_metrics(dict(metrics), step=trainer.global_step)
        except OSError as error:
            if not lives_through(trainer, error):
                raise
            logger.error("metrics of step %d are lost: %s", trainer.global_step, error)
