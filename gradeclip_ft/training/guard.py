"""Stops a run before a loss or gradient that is not finite spoils the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.ops.distributed import world_size
from gradeclip_ft.training.checkpoints import Checkpoints


class NonFiniteError(RuntimeError):
    """Loss or gradient is not finite; the weights are still those of the step before."""


class StopOnNonFinite(pl.Callback):
    """Stops before an update that would spoil the weights; names step, samples and checkpoint.

    One value is read back from the device per step. In fp16 the loss scaler deals with gradients
    itself, so there only the loss is looked at.

    Attributes:
        gradient_norm: Norm over all gradients of the current step, before clipping.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.gradient_norm: Tensor = torch.zeros(())
        self._checkpoints = checkpoints
        self._keys: tuple[str, ...] = ()
        self._loss: Tensor = torch.zeros(())

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: CaptionBatch,
        batch_idx: int,
    ) -> None:
        """Remember the samples."""
        self._keys = batch.keys

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Remember the loss."""
        self._loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at loss and gradients; every process stops where one of them has to.

        Raises:
            NonFiniteError: If the loss or a gradient is NaN or infinite.
        """
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.gradient_norm = nn.utils.get_total_norm(gradients)
        good = self._loss.isfinite()
        if trainer.precision != "16-mixed":
            good = good & self.gradient_norm.isfinite()
        everywhere = good.float()
        if world_size() > 1:
            dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        if not bool(everywhere):
            self._stop(trainer, bool(good))

    def _stop(self, trainer: pl.Trainer, good: bool) -> None:
        own = None if good else (float(self._loss), float(self.gradient_norm), self._keys)
        reports = gather(own)
        lines = [
            f"  process {rank}: loss {report[0]:g}, gradient norm {report[1]:g}, "
            f"samples {', '.join(report[2])}"
            for rank, report in enumerate(reports)
            if report is not None
        ]
        if trainer.global_step:
            self._checkpoints.save(trainer)
        raise NonFiniteError(
            f"step {trainer.global_step + 1} is not finite, training stopped before the update.\n"
            + "\n".join(lines)
            + f"\nlast good checkpoint: {self._checkpoints.last_good}.\n"
            "Look at these samples, or start from the weights (init_from=) with a smaller "
            "optim.optimizer.lr or trainer.precision=32-true"
        )


def gather(value: Any) -> Sequence[Any]:
    """The values of all processes, in order of rank. A collective: all processes call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
