"""Keeps what is not finite away from the weights, and says where it came from."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.ops.distributed import world_size
from gradeclip_ft.training.checkpoints import Checkpoints

DUMP = "non_finite.jsonl"
logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Loss or gradient is not finite; the weights are still those of the step before."""


class StopOnNonFinite(pl.Callback):
    """Leaves out updates that would spoil the weights; stops the run when there are too many.

    A step that is left out counts as a step: schedule and data go on, weights and moments stay.
    Every process decides the same. Step, samples and values go to `non_finite.jsonl`. One value is
    read back from the device per step. In fp16 the loss scaler deals with gradients itself, so
    there only the loss is looked at.

    Args:
        folder: Of the run.
        checkpoints: To save what is good before the run stops.
        most: Steps that may be left out in the whole run; one more stops it.

    Attributes:
        gradient_norm: Norm over all gradients of the current step, before clipping.
        left_out: Steps left out so far.
    """

    def __init__(self, folder: Path, checkpoints: Checkpoints, *, most: int = 0) -> None:
        if most < 0:
            raise ValueError(f"max_non_finite is {most}; give the steps to leave out, 0 or more")
        self.gradient_norm: Tensor = torch.zeros(())
        self.left_out = 0
        self._folder = folder
        self._checkpoints = checkpoints
        self._most = most
        self._keys: list[str] = []
        self._loss: Tensor = torch.zeros(())
        self._good: Tensor = torch.ones((), dtype=torch.bool)

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: CaptionBatch,
        batch_idx: int,
    ) -> None:
        """Remember the samples, of all batches of a step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._keys, self._good = [], torch.ones_like(self._good)
        self._keys.extend(batch.keys)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Remember the loss."""
        self._loss = loss.detach()
        self._good = self._good.to(loss.device) & self._loss.isfinite()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at loss and gradients; no process updates where one of them must not.

        Raises:
            NonFiniteError: If this is one step too many.
        """
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.gradient_norm = nn.utils.get_total_norm(gradients)
        good = self._good
        if trainer.precision != "16-mixed":
            good = good & self.gradient_norm.isfinite()
        everywhere = good.float()
        if world_size() > 1:
            dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        if not bool(everywhere):
            self._leave_out(trainer, pl_module, bool(good))

    def state_dict(self) -> dict[str, Any]:
        """Steps left out so far; enters the checkpoint."""
        return {"left_out": self.left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self.left_out = int(state_dict["left_out"])

    def _leave_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule, good: bool) -> None:
        own = None if good else (float(self._loss), float(self.gradient_norm), tuple(self._keys))
        reports = {rank: report for rank, report in enumerate(gather(own)) if report is not None}
        self.left_out += 1
        stops = self.left_out > self._most
        if stops and trainer.global_step:
            self._checkpoints.save(trainer)
        if trainer.is_global_zero:
            self._dump(trainer.global_step + 1, reports, stops=stops)
        if stops:
            raise NonFiniteError(self._message(trainer.global_step + 1, reports))
        logger.warning(
            "step %d is not finite and left out (%d of %d): see %s",
            trainer.global_step + 1,
            self.left_out,
            self._most,
            self._folder / DUMP,
        )
        if trainer.precision != "16-mixed":  # there the scaler skips, and must see gradients
            pl_module.zero_grad(set_to_none=True)  # an optimiser passes over these

    def _dump(self, step: int, reports: dict[int, Any], *, stops: bool) -> None:
        processes = [
            {"process": rank, "loss": str(loss), "gradient_norm": str(norm), "samples": list(keys)}
            for rank, (loss, norm, keys) in reports.items()
        ]
        line = {
            "step": step,
            "stopped": stops,
            "last_good": self._checkpoints.last_good,
            "processes": processes,
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / DUMP).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _message(self, step: int, reports: dict[int, Any]) -> str:
        before = f"; {self.left_out - 1} steps before were left out" if self._most else ""
        lines = [
            f"  process {rank}: loss {loss:g}, gradient norm {norm:g}, samples {', '.join(keys)}"
            for rank, (loss, norm, keys) in reports.items()
        ]
        return (
            f"step {step} is not finite, training stopped before the update{before}.\n"
            + "\n".join(lines)
            + f"\nlast good checkpoint: {self._checkpoints.last_good}; all such steps stand in "
            f"{self._folder / DUMP}.\n"
            "Look at these samples, raise trainer.max_non_finite, or start from the weights "
            "(init_from=) with a smaller optim.optimizer.lr or trainer.precision=32-true"
        )


def gather(value: Any) -> Sequence[Any]:
    """The values of all processes, in order of rank. A collective: all processes call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
