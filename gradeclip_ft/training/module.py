"""The training step: an objective on a CLIP model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.models.clip import Clip, Preprocessing
from gradeclip_ft.objectives.base import Composed, Objective
from gradeclip_ft.training.cache import FrozenCache
from gradeclip_ft.training.optim import freeze

MAX_LOG_SCALE = math.log(100.0)


class FineTuneModule(pl.LightningModule):
    """Fine-tunes `clip` by `objective`.

    The whole objective runs inside `training_step`, so DDP sees one forward, however often the
    towers are called. The random numbers of a batch depend on seed, step, place in the step and
    process alone: a resumed run needs no generator state.

    Args:
        clip: The model; its parameters are trained in place.
        objective: Batch to loss; one with weights of its own is an `nn.Module` and learns as well.
        optimizer: Named parameters to optimiser.
        schedule: Optimiser to learning-rate schedule, advanced once per step.
        seed: Start of the random numbers that steps draw.
        preprocessing: Of the model; needed for batches whose pixels are colours of 8 bits.
        train_image: Whether the image tower learns.
        train_text: Whether the text tower learns.
        train_temperature: Whether the temperature learns.
        image_blocks: Number of last image blocks that learn, with final norm and projection; all if
            None.
        grad_checkpointing: Recompute activations in the backward pass: less memory, more time.
        compile: Backend of `torch.compile` for the transformer blocks; None compiles nothing.
        cache: Folder for what frozen blocks and a frozen text tower compute, and for maps and
            embeddings of the start model; see `FrozenCache`.
    """

    def __init__(
        self,
        clip: Clip,
        objective: Objective,
        *,
        optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer],
        schedule: Callable[[Optimizer], LRScheduler],
        seed: int = 0,
        preprocessing: Preprocessing | None = None,
        train_image: bool = True,
        train_text: bool = True,
        train_temperature: bool = True,
        image_blocks: int | None = None,
        grad_checkpointing: bool = False,
        compile: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        objective.check(clip)
        self.clip = clip
        self.objective = objective
        self.seed = seed
        self._preprocessing = preprocessing
        self._optimizer = optimizer
        self._schedule = schedule
        freeze(
            clip.model,
            train_image=train_image,
            train_text=train_text,
            train_temperature=train_temperature,
            image_blocks=image_blocks,
        )
        if isinstance(objective, Composed):
            objective.begin(clip)
        teachers = getattr(objective, "teachers", {})
        start = teachers["start"].clip if "start" in teachers else None
        self._cache = None if cache is None else FrozenCache(clip, cache, start=start)
        if self._cache is not None:
            self._cache.serve(clip)
            if start is not None:
                teachers["start"].stored = self._cache
            if self._cache.serves(getattr(objective, "explainer", None)):
                for teacher in teachers.values():
                    self._cache.serve(teacher.clip)
        if grad_checkpointing:
            clip.set_grad_checkpointing()
        if compile is not None:
            clip.compile_blocks(compile)

    def training_step(self, batch: CaptionBatch, batch_idx: int) -> dict[str, Any]:
        """Total loss of the objective, its parts, and the make-up of the batch."""
        if batch.images.dtype == torch.uint8:  # a quarter as long on the way to the device
            if self._preprocessing is None:
                raise ValueError(
                    "the images of the batch are colours of 8 bits, expected normalised pixels; "
                    "give preprocessing=loaded.preprocessing"
                )
            batch = replace(batch, images=self._preprocessing.normalise(batch.images))
        if self._cache is not None:
            self._cache.watch(batch.images)
        terms = self.objective(self.clip, batch)
        # DDP wants every parameter in the graph, also a temperature that this objective ignores
        loss = terms.total + 0.0 * self.clip.log_scale
        images = len(batch.images)
        served = batch.owner.new_zeros(images).index_fill(0, batch.owner, 1)
        make_up = {
            "temperature": self.clip.log_scale.detach().exp(),
            "phrases_per_caption": len(batch.phrase) / images,
            "captions_without_phrase": 1 - served.float().mean(),
        }
        return {"loss": loss, "metrics": {**terms.parts, **make_up}}

    def on_fit_start(self) -> None:
        """Loaded models come in evaluation mode."""
        self.train()

    def on_train_batch_start(self, batch: CaptionBatch, batch_idx: int) -> None:
        """Starts the random numbers of the batch."""
        seed_batch(self, batch_idx)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning would refuse a fused optimiser in any mixed precision; bf16 has no scaler."""
        by_norm = gradient_clip_algorithm != "value"
        if gradient_clip_val and by_norm and self.trainer.precision == "bf16-mixed":
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Updates the weights, then keeps the temperature between 1 and 100 as CLIP does."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.clip.log_scale.clamp_(0.0, MAX_LOG_SCALE)
        if isinstance(self.objective, Composed):
            self.objective.after_step(self.clip, self.trainer.global_step + 1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Optimiser over everything that learns, and its schedule per step."""
        return configured(self, self._optimizer, self._schedule)


def seed_batch(module: Any, batch_idx: int) -> None:
    """Random numbers of a batch: they depend on seed, step, place in the step and process alone."""
    trainer = module.trainer
    offset = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(module.seed)))
    per_step, processes = trainer.accumulate_grad_batches, trainer.world_size
    number = trainer.global_step * per_step + batch_idx % per_step
    torch.manual_seed((offset + number) * processes + module.global_rank)


def configured(
    module: nn.Module,
    optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer],
    schedule: Callable[[Optimizer], LRScheduler],
) -> OptimizerLRSchedulerConfig:
    """Optimiser over everything in the module that learns, and its schedule per step."""
    made = optimizer(module.named_parameters())
    per_step = LRSchedulerConfigType(scheduler=schedule(made), interval="step")
    return OptimizerLRSchedulerConfig(optimizer=made, lr_scheduler=per_step)
