"""The training step of a detector, beside that of a CLIP (`module.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gradeclip_ft.batch import DetectionBatch
from gradeclip_ft.detection.detector import Detector, Vocabulary
from gradeclip_ft.detection.objective import DetectionObjective
from gradeclip_ft.training.module import configured, seed_batch


class DetectorModule(pl.LightningModule):
    """Trains the detector's own parts; the CLIP in it is frozen.

    Data, checkpoints, metrics, evaluation and resuming are those of `FineTuneModule`.

    Args:
        detector: Its own parameters are trained in place.
        objective: Batch and vocabulary to loss.
        classes: All classes of the data, and the base classes; asked for when the data are there.
        optimizer: Named parameters to optimiser.
        schedule: Optimiser to learning-rate schedule, advanced once per step.
        seed: Start of the random numbers that steps draw.
    """

    def __init__(
        self,
        detector: Detector,
        objective: DetectionObjective,
        classes: Callable[[], tuple[list[str], list[str]]],
        *,
        optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer],
        schedule: Callable[[Optimizer], LRScheduler],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.clip = detector  # under the name by which checkpoints find the weights to save
        self.seed = seed
        self._objective = objective
        self._classes = classes
        self._vocabulary: Vocabulary | None = None
        self._optimizer = optimizer
        self._schedule = schedule

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> dict[str, Any]:
        """Total loss, and its parts."""
        assert self._vocabulary is not None
        terms = self._objective(self.clip, batch, self._vocabulary)
        boxes = len(batch.boxes) / len(batch.images)
        return {"loss": terms.total, "metrics": {**terms.parts, "boxes_per_image": boxes}}

    def on_train_start(self) -> None:
        """Embeds the classes: the text tower is frozen, so once is enough."""
        self._vocabulary = self.clip.vocabulary(*self._classes())
        self.train()

    def on_train_batch_start(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Starts the random numbers of the batch, which draw the samples."""
        seed_batch(self, batch_idx)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Optimiser over everything that learns, and its schedule per step."""
        return configured(self, self._optimizer, self._schedule)
