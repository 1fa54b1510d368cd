"""What happens around the steps: metrics, non-finite losses, evaluation, progress, signals."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor, nn
from torch.optim import Optimizer

from gradeclip_ft.batch import TrainBatch
from gradeclip_ft.evaluators.base import Evaluator, Item, Track, prepare, run_all, untracked
from gradeclip_ft.export.export import mix, mixed
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.distributed import SIGNALS, anywhere, patient_barrier, world_size
from gradeclip_ft.results.masking import masked_texts
from gradeclip_ft.results.record import result_path
from gradeclip_ft.training.checkpoints import Checkpoints, keep_best, tolerating_full_disk
from gradeclip_ft.training.data_module import CaptionDataModule
from gradeclip_ft.training.loggers import FileLogger

DUMP = "non_finite.jsonl"
PATIENCE = timedelta(days=1)  # other processes wait this long while the first one evaluates
SHOWN = ("loss", "global", "local", "samples_per_second")
MUCH = 10  # times the global loss, from which on the local one leaves it little to say
INTERRUPTED = 143  # exit code of a program that ended on SIGTERM
logger = logging.getLogger(__name__)


def gather(value: Any) -> Sequence[Any]:
    """The values of all processes, in order of rank. A collective: all processes call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def finishes_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether this batch is the last one that its step accumulates."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class MetricsRecorder(pl.Callback):
    """Collects the metrics of all processes and hands them to the loggers every `every` steps.

    Args:
        every: Steps between two records.
        lines: Whether to print a line of text for each record, with the epoch and the time left.

    Attributes:
        latest: Metrics of the last recorded step.
    """

    def __init__(self, *, every: int, lines: bool = False) -> None:
        if every < 1:
            raise ValueError(
                f"log_every is {every}; give the number of steps between lines, 1 or more"
            )
        self.latest: dict[str, float] = {}
        self._every = every
        self._lines = lines
        self._noted: dict[str, Tensor | float] = {}
        # Skipped samples: of all processes up to the last gathering, then of this one in the steps
        # finished since, then of the unfinished step.
        self._total: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._unfinished: Counter[str] = Counter()
        self._images = 0
        self._seconds = 0.0
        self._waited = 0.0
        self._begun = 0.0
        self._rate = 0.0
        self._first: tuple[float, int] | None = None  # time and step at the first batch
        self._hinted = False

    def note(self, **values: Tensor | float) -> None:
        """Values of the current step that another callback knows; the same on all processes."""
        self._noted |= values

    def collect(self) -> None:
        """Bring the skipped samples of all processes together. A collective."""
        self._add_up(gather(dict(self._finished)))

    def _add_up(self, skipped: Sequence[Mapping[str, int]]) -> None:
        for each in skipped:
            self._total.update(each)
        self._finished = Counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run writes the lines after its checkpoint again."""
        for receiver in trainer.loggers:
            if isinstance(receiver, FileLogger):
                receiver.forget_after(trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()
        self._first = self._first or (self._begun, trainer.global_step)

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
        batch: TrainBatch,
        batch_idx: int,
    ) -> None:
        """Count; every `every` steps, and at the last one, record."""
        self._seconds += time.perf_counter() - self._begun
        self._images += len(batch.images)
        self._unfinished.update(batch.skipped)
        if not finishes_step(trainer, batch_idx):
            return
        self._finished += self._unfinished
        self._unfinished = Counter()
        step = trainer.global_step
        if step % self._every == 0 or step == trainer.max_steps:
            self._record(trainer, outputs["metrics"], outputs["loss"])
            self._hint(trainer, pl_module)

    def _hint(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once: that one of the two losses leaves the other one little to say."""
        objective = getattr(pl_module, "objective", None)
        whole = self.latest.get("global", 0.0) * getattr(objective, "global_weight", 1.0)
        local = self.latest.get("local", 0.0) * getattr(objective, "local_weight", 1.0)
        if self._hinted or not trainer.is_global_zero or not local >= MUCH * whole > 0:
            return
        self._hinted = True
        logger.info(
            "the local loss is %.3g, %.0f times the global one: it is a sum over the phrases of a "
            "batch, as in the paper; where retrieval suffers, objective.alignment.reduction=mean "
            "makes it their mean, and objective.local_weight= weighs it",
            *(local, local / whole),
        )

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
            "learning_rate": self._rate,
            **{name: float(value) for name, value in self._noted.items()},
            "skipped": float(self._total.total()),
            **{f"skipped/{cause}": float(count) for cause, count in sorted(self._total.items())},
        }
        self._images, self._seconds, self._waited = 0, 0.0, waited
        log(trainer, self.latest)
        if self._lines and trainer.is_global_zero:
            shown = {name: self.latest[name] for name in SHOWN if name in self.latest}
            speed = f"{shown.pop('samples_per_second'):.0f} samples/s"
            losses = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            step = f"step {trainer.global_step}/{trainer.max_steps}"
            where = "  ".join(filter(None, (step, epoch_of(trainer))))
            print(f"{where}  {losses}  {speed}  {self._left(trainer)} left", flush=True)

    def _left(self, trainer: pl.Trainer) -> str:
        """Time to the last step, at the pace since the first one, evaluations included."""
        assert self._first is not None
        begun, at = self._first
        pace = (time.perf_counter() - begun) / max(trainer.global_step - at, 1)
        return str(timedelta(seconds=round(pace * (trainer.max_steps - trainer.global_step))))

    def state_dict(self) -> dict[str, Any]:
        """Samples skipped in all finished steps; part of the checkpoint.

        Those of other processes since they were last gathered are missing; a save that all take
        part in gathers first.
        """
        return {"skipped": dict(self._total + self._finished)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting where the interrupted run stopped."""
        self._total = Counter(state_dict["skipped"])


def log(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Hand metrics of the current step to every logger; loggers write on the first process only."""
    for receiver in trainer.loggers:
        with tolerating_full_disk(trainer, "metrics"):
            receiver.log_metrics(dict(metrics), step=trainer.global_step)


def epoch_of(trainer: pl.Trainer) -> str:
    """The pass over the data that the last step belongs to; empty where it cannot be told."""
    data = getattr(trainer, "datamodule", None)
    steps = data.steps_per_epoch if isinstance(data, CaptionDataModule) else 0.0
    if not steps:
        return ""
    epoch = math.ceil(max(trainer.global_step, 1) / steps - 1e-9)
    return f"epoch {epoch}/{math.ceil(trainer.max_steps / steps - 1e-9)}"


class NonFiniteError(RuntimeError):
    """Loss or gradient is not finite; the weights are still those of the step before."""


@dataclass(eq=False)
class NonFiniteGuard(pl.Callback):
    """Skips updates that would spoil the weights; stops the run when there are too many.

    A skipped step counts as a step: schedule and data go on, weights and moments stay. Every
    process decides the same. Step, samples and values go to `non_finite.jsonl`. One value is read
    back from the device per step. In fp16 the loss scaler deals with gradients itself, so there
    only the loss is looked at.

    Attributes:
        folder: Of the run.
        checkpoints: Used to save the last good state before stopping.
        recorder: Told the norm over all gradients before clipping, and the steps skipped so far.
        most: Steps that may be skipped in the whole run; one more stops it.
    """

    folder: Path
    checkpoints: Checkpoints
    recorder: MetricsRecorder
    most: int = 0

    def __post_init__(self) -> None:
        if self.most < 0:
            raise ValueError(f"max_non_finite is {self.most}; give the steps to skip, 0 or more")
        self._left_out = 0
        self._keys: list[str] = []
        self._loss: Tensor = torch.zeros(())
        self._good: Tensor = torch.ones((), dtype=torch.bool)

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: TrainBatch,
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
        """Look at loss and gradients; no process updates if one of them must not.

        Raises:
            NonFiniteError: If this is one step too many.
        """
        norm = nn.utils.get_total_norm(p.grad for p in pl_module.parameters() if p.grad is not None)
        good = self._good
        if trainer.precision != "16-mixed":
            good = good & norm.isfinite()
        everywhere = good.float()
        if world_size() > 1:
            dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        if not bool(everywhere):
            self._skip(trainer, None if bool(good) else (float(self._loss), float(norm)))
            if trainer.precision != "16-mixed":  # there the scaler skips, and must see gradients
                pl_module.zero_grad(set_to_none=True)  # an optimiser passes over these
        self.recorder.note(gradient_norm=norm, left_out_steps=float(self._left_out))

    def _skip(self, trainer: pl.Trainer, own: tuple[float, float] | None) -> None:
        """Report and count; `own` is loss and norm if it is this process that is not finite."""
        step = trainer.global_step + 1
        everyone = gather(
            own and {"loss": str(own[0]), "gradient_norm": str(own[1]), "samples": self._keys}
        )
        processes = [{"process": rank, **bad} for rank, bad in enumerate(everyone) if bad]
        self._left_out += 1
        stops = self._left_out > self.most
        if stops and trainer.global_step:
            self.checkpoints.save(trainer)
        last_good = self.checkpoints.last_good
        if trainer.is_global_zero:
            line = {"step": step, "stopped": stops, "last_good": last_good, "processes": processes}
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / DUMP).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if not stops:
            logger.warning(
                "step %d is not finite and was skipped (%d of %d): see %s",
                *(step, self._left_out, self.most, self.folder / DUMP),
            )
            return
        before = f"; {self._left_out - 1} steps before were skipped" if self.most else ""
        lines = [
            f"  process {bad['process']}: loss {bad['loss']}, "
            f"gradient norm {bad['gradient_norm']}, samples {', '.join(bad['samples'])}"
            for bad in processes
        ]
        raise NonFiniteError(
            f"step {step} is not finite, training stopped before the update{before}.\n"
            + "\n".join(lines)
            + f"\nlast good checkpoint: {last_good}; all such steps: {self.folder / DUMP}.\n"
            "Look at these samples, raise trainer.max_non_finite, or start from the weights "
            "(init_from=) with a smaller optim.optimizer.lr or trainer.precision=32-true"
        )

    def state_dict(self) -> dict[str, Any]:
        """Steps skipped so far; part of the checkpoint."""
        return {"left_out": self._left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._left_out = int(state_dict["left_out"])


def require_evaluation(every: int | None, alphas: Sequence[float]) -> None:
    """Refuse now what would end the run at its first or after its last step.

    Raises:
        ValueError: `every` is below 1, or a share outside of 0 to 1.
    """
    if every is not None and every < 1:
        raise ValueError(f"evaluation.every is {every}; give 1 step or more, or null")
    for alpha in alphas:
        mix({}, {}, alpha)


@dataclass(eq=False)
class Evaluate(pl.Callback):
    """Runs evaluators before the first step, every `every` steps and after the last one.

    The first process evaluates, the others wait. The data are checked before training begins, so
    that a missing file does not show days later.

    Attributes:
        evaluators: By any key.
        loaded: The model that is trained.
        folder: Where the results go, one JSON per evaluator and step.
        run: Name of the run.
        every: Steps between two evaluations; None for none in between.
        before: Whether to evaluate the untouched model.
        after: Whether to evaluate the finished one.
        best: Metric, `EVALUATOR/METRIC`, whose best weights are kept as `best.safetensors`. The
            untouched model is then evaluated in any case, which shows that there is such a metric.
        alphas: Shares of the tuned weights; the finished model is also evaluated with each, the
            rest being the weights before training (Wortsman et al., "Robust fine-tuning").
        command: Command line for the results.
        record: What the results hold of protocol, data and weights.
        track: Shows progress where the bar of the training does not.
        evaluated: Step of the last evaluation; None before the first.
    """

    evaluators: Mapping[str, Evaluator]
    loaded: LoadedClip
    folder: Path
    run: str
    every: int | None = None
    before: bool = True
    after: bool = True
    best: str | None = None
    alphas: Sequence[float] = ()
    command: str | None = None
    record: Callable[[Any], Any] = masked_texts
    track: Track = untracked
    evaluated: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        require_evaluation(self.every, self.alphas)
        self.before |= self.best is not None
        self._wait = patient_barrier(PATIENCE)
        self._alphas = [alpha for alpha in self.alphas if alpha != 1.0]
        state = self.loaded.clip.model.state_dict() if self._alphas else {}
        self._start = {key: value.clone() for key, value in state.items()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make or check the data, on one process."""
        if trainer.is_global_zero and (self.before or self.after or self.every):
            for evaluator in self.evaluators.values():
                prepare(evaluator)
        self._wait()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate before the first step; after resuming, what the interrupted run missed."""
        if self.before and trainer.global_step == 0:
            self._evaluate(trainer)
        elif self._due(trainer):
            self._evaluate(trainer, missed=True)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """When it is time; the last step is left to `on_train_end`."""
        if self._due(trainer) and trainer.global_step != self.evaluated:
            self._evaluate(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The finished model."""
        if self.after:
            self._evaluate(trainer)

    def measure(self, trainer: pl.Trainer) -> None:
        """Evaluate the model in this process; results and loggers get the numbers."""
        step, bar = trainer.global_step, trainer.progress_bar_callback
        evaluate = partial(
            run_all,
            self.evaluators,
            self.loaded,
            folder=self.folder,
            run=self.run,
            step=step,
            command=self.command,
            record=self.record,
            track=bar.track if isinstance(bar, Bar) and bar.lives else self.track,
        )
        results = evaluate()
        for alpha in self._alphas if step >= trainer.max_steps else ():
            with mixed(self.loaded.clip.model, self._start, alpha):
                evaluate(alpha=alpha)
        found: dict[str, float] = {}
        for result in results:
            logger.info("evaluated %s at step %d in %.1f s", result.evaluator, step, result.seconds)
            numbers = {f"{result.evaluator}/{name}": v for name, v in result.metrics.items()}
            log(trainer, numbers)
            found |= numbers
        if self.best is not None:
            weights = self.loaded.clip.model.state_dict()
            keep_best(self.folder.parent, self.best, found, weights, step=step)

    def _evaluate(self, trainer: pl.Trainer, *, missed: bool = False) -> None:
        """Evaluate on the first process while the others wait, or only what was missed."""
        step = self.evaluated = trainer.global_step
        names = [evaluator.name for evaluator in self.evaluators.values()]
        paths = [result_path(self.folder, name, step) for name in names]
        if trainer.is_global_zero and not (missed and all(path.exists() for path in paths)):
            with tolerating_full_disk(trainer, "results"):
                self.measure(trainer)
        self._wait()

    def _due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        return self.every is not None and step % self.every == 0 and 0 < step < trainer.max_steps


class Bar(RichProgressBar):
    """Lightning's bar with epoch, losses and samples per second of the last recorded step."""

    def __init__(self, recorder: MetricsRecorder) -> None:
        super().__init__(refresh_rate=10)
        self._recorder = recorder

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Numbers to the right of the bar."""
        latest = self._recorder.latest
        return {name: latest[name] for name in SHOWN if name in latest}

    @property
    def lives(self) -> bool:
        """Whether it is on the screen."""
        return self.progress is not None and not self._progress_stopped

    def track(self, items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
        """The same items, with a bar of their own below that of the training."""
        assert self.progress is not None
        task = self._add_task(total, what)
        for item in items:
            yield item
            self.progress.advance(task)
        self.progress.remove_task(task)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Move on, and name the epoch."""
        super().on_train_batch_end(trainer, *args, **kwargs)
        if self.progress is not None and self.train_progress_bar_id is not None:
            epoch = self._get_train_description(0)
            self.progress.update(self.train_progress_bar_id, description=epoch)

    def _get_train_description(self, current_epoch: int) -> str:
        return epoch_of(self.trainer) or "training"  # to Lightning the run is one epoch


class StopOnSignal(pl.Callback):
    """Saves and leaves after the step in which any process got a signal."""

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
        """When a step is finished, compare notes; a collective.

        Raises:
            SystemExit: Any process got a signal; the step is saved.
        """
        if finishes_step(trainer, batch_idx) and anywhere(self._received, pl_module.device):
            self._checkpoints.save(trainer)
            raise SystemExit(INTERRUPTED)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True
