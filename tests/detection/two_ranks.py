"""One of two processes of `test_detector_training.py`, or one alone: a step on a detector."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from gradeclip_ft.batch import DetectionBatch
from gradeclip_ft.detection.objective import DetectionObjective
from gradeclip_ft.training.data_module import CaptionDataModule
from gradeclip_ft.training.detector import DetectorModule
from gradeclip_ft.training.optim import adamw, warmup_constant
from gradeclip_ft.training.trainer import make_trainer
from tests.detection.conftest import BASE, NAMES, make_detection_batch, make_detector

RANKS, IMAGES = 2, 3
EVERYTHING = 10**6  # samples: the draws of two processes are others than those of one


def part(batch: DetectionBatch, rank: int) -> DetectionBatch:
    """What one process sees."""
    rows = slice(IMAGES * rank, IMAGES * (rank + 1))
    mine = (batch.owner >= rows.start) & (batch.owner < rows.stop)
    return replace(
        batch,
        images=batch.images[rows],
        sizes=batch.sizes[rows],
        scale=batch.scale[rows],
        boxes=batch.boxes[mine],
        labels=batch.labels[mine],
        owner=batch.owner[mine] - rows.start,
        keys=batch.keys[rows],
    )


@dataclass
class Batches:
    """A source of the same few batches; each process gets its part if `split`."""

    split: bool = False
    batches: int = 1
    resampled: bool = False
    workers: int = 0
    batch_size: int = IMAGES

    def prepare(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def loader(self, *, seed: int, epoch: int, rank: int, world_size: int, start: int = 0) -> Epoch:
        """Batches that differ by epoch and place."""
        found = [
            make_detection_batch(IMAGES * RANKS, seed=1 + number + self.batches * epoch)
            for number in range(self.batches)
        ]
        return Epoch([part(one, rank) if self.split else one for one in found], start)


class Epoch(list[DetectionBatch]):
    """Iterates from `start` on; its length is that of the whole epoch."""

    def __init__(self, batches: list[DetectionBatch], start: int) -> None:
        super().__init__(batches)
        self.start = start

    def __iter__(self) -> Any:
        return iter(list(super().__iter__())[self.start :])


class Keep(pl.Callback):
    """Keeps the gradients as the optimiser gets them, and the losses."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        for name, parameter in pl_module.clip.named_parameters():
            if parameter.requires_grad:
                self.kept[name] = parameter.grad.clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.kept["loss"] = outputs["loss"].detach().clone()
        self.losses.append(float(outputs["loss"]))


def module(samples: int, lr: float = 0.0) -> DetectorModule:
    """The training step of a small detector."""
    return DetectorModule(
        make_detector(anchor_samples=samples),
        DetectionObjective(samples=samples),
        lambda: (list(NAMES), list(BASE)),
        optimizer=partial(adamw, lr=lr),
        schedule=partial(warmup_constant, warmup=2),
    )


def step(folder: Path, devices: int) -> dict[str, Tensor]:
    """One step; the gradients after DDP, and the loss of all images."""
    keep = Keep()
    parallel = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    trainer = make_trainer(folder, [], [keep], max_steps=1, **parallel)
    data = CaptionDataModule(Batches(split=devices > 1), seed=0)
    trainer.fit(module(EVERYTHING), datamodule=data)
    loss = keep.kept["loss"]
    if devices > 1:
        torch.distributed.all_reduce(loss)
    return {**keep.kept, "loss": loss / devices}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    target = Path(sys.argv[1])
    torch.save(step(target / "run", RANKS), target / f"rank{os.environ['RANK']}")
