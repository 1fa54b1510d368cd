"""Evaluation around training: before it, at some steps, and after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from gradeclip_ft.evaluators.base import Evaluator, run_all
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.distributed import patient_barrier
from gradeclip_ft.results.record import result_path
from gradeclip_ft.training.best import Best
from gradeclip_ft.training.callbacks import log
from gradeclip_ft.training.checkpoints import lives_through

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
