"""What happens around the steps: metrics of all processes are collected and recorded."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor, nn
from torch.optim import Optimizer

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.evaluators.base import Evaluator, run_all
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.distributed import SIGNALS, anywhere, patient_barrier, world_size
from gradeclip_ft.results.record import result_path
from gradeclip_ft.training.checkpoints import Best, Checkpoints, lives_through
from gradeclip_ft.training.data_module import CaptionDataModule
from gradeclip_ft.training.loggers import FileLogger

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


# Other processes wait this long while the first one evaluates.
PATIENCE = timedelta(days=1)
logger = logging.getLogger(__name__)


class Evaluate(pl.Callback):
    """Runs evaluators before the first step, every `every` steps and after the last one.

    The first process evaluates, the others wait. The data are checked before training begins, so
    that a missing file does not show days later.

    Args:
        evaluators: By any key.
        loaded: The model that is trained.
        folder: Where the results go, one JSON per evaluator and step.
        run: Name of the run.
        every: Steps between two evaluations; None for none in between.
        before: Whether to evaluate the untouched model.
        after: Whether to evaluate the finished one.
        best: Metric, `EVALUATOR/METRIC`, whose best weights are kept as `best.safetensors`.
        command: Command line for the results.

    Attributes:
        evaluated: Step of the last evaluation; None before the first.
    """

    def __init__(
        self,
        evaluators: Mapping[str, Evaluator],
        loaded: LoadedClip,
        *,
        folder: Path,
        run: str,
        every: int | None = None,
        before: bool = True,
        after: bool = True,
        best: str | None = None,
        command: str | None = None,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"evaluation.every is {every}; give 1 step or more, or null")
        self.evaluated: int | None = None
        self._wait: Callable[[], None] = lambda: None
        self._evaluators = evaluators
        self._loaded = loaded
        self._folder = folder
        self._run = run
        self._every = every
        self._before = before
        self._after = after
        self._best = None if best is None else Best(folder.parent, best)
        self._command = command

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make or check the data, on one process."""
        self._wait = patient_barrier(PATIENCE)
        if trainer.is_global_zero and (self._before or self._after or self._every):
            for evaluator in self._evaluators.values():
                evaluator.prepare()
        self._wait()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The untouched model; in a resumed run, what its end left out."""
        if self._before and trainer.global_step == 0:
            self.evaluate(trainer)
        elif self._due(trainer):
            if trainer.is_global_zero and not self._stands(trainer.global_step):
                self._try(trainer)
            self._wait()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Where it is time; the last step is left to `on_train_end`."""
        if self._due(trainer) and trainer.global_step != self.evaluated:
            self.evaluate(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The finished model."""
        if self._after:
            self.evaluate(trainer)

    def evaluate(self, trainer: pl.Trainer) -> None:
        """Evaluate the model as it is, on the first process while the others wait. A collective."""
        if trainer.is_global_zero:
            self._try(trainer)
        self.evaluated = trainer.global_step
        self._wait()

    def _try(self, trainer: pl.Trainer) -> None:
        """Evaluate; on a full disk without results, if training is to go on there."""
        try:
            self.measure(trainer)
        except OSError as error:
            if not lives_through(trainer, error):
                raise
            logger.error("results of step %d are lost: %s", trainer.global_step, error)

    def _due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        return self._every is not None and step % self._every == 0 and 0 < step < trainer.max_steps

    def _stands(self, step: int) -> bool:
        """Whether every evaluator has left its results of this step."""
        names = [evaluator.name for evaluator in self._evaluators.values()]
        return all(result_path(self._folder, name, step).exists() for name in names)

    def measure(self, trainer: pl.Trainer) -> None:
        """Evaluate the model in this process; results and loggers get the numbers."""
        results = run_all(
            self._evaluators,
            self._loaded,
            folder=self._folder,
            run=self._run,
            step=trainer.global_step,
            command=self._command,
        )
        found: dict[str, float] = {}
        for result in results:
            place = f"{result.evaluator} at step {result.step}"
            logger.info("evaluated %s in %.1f s", place, result.seconds)
            numbers = {f"{result.evaluator}/{name}": v for name, v in result.metrics.items()}
            log(trainer, numbers)
            found |= numbers
        if self._best is not None:
            weights = self._loaded.clip.model.state_dict()
            self._best.offer(found, weights, step=trainer.global_step)


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
