"""Caption data as Lightning wants it, with an exact position.

To Lightning the whole run is one pass of `max_steps` batches. It consists of the source's epochs,
each in an order fixed by seed and epoch. Where a pass begins follows from the number of finished
steps, so a resumed run continues with the very batch that comes next, also in the middle of an
epoch, whatever was prefetched when it stopped. Where samples are drawn with replacement, a run may
also continue with other processes, workers or batch sizes: it then begins new draws, and counts
epochs from there.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl

from gradeclip_ft.batch import TrainBatch
from gradeclip_ft.ops.distributed import rank as process_rank

# What may change where samples are drawn with replacement; the draws are then new ones.
ELASTIC = {"world_size", "workers", "batch_size", "batches_per_epoch"}
logger = logging.getLogger(__name__)


@runtime_checkable
class Epoch(Protocol):
    """Batches of one epoch; `len()` counts all of it, also where iteration begins later."""

    def __iter__(self) -> Iterator[TrainBatch]: ...
    def __len__(self) -> int: ...


@runtime_checkable
class CaptionSource(Protocol):
    """Where caption batches come from; what is here alone decides an epoch's order."""

    @property
    def workers(self) -> int:
        """Loader processes per process; 0 reads in the process itself, in the order of 1."""

    @property
    def batch_size(self) -> int:
        """Samples of a batch."""

    @property
    def resampled(self) -> bool:
        """Whether samples are drawn with replacement, so that no process has a share of its own."""

    def prepare(self) -> dict[str, Any]:
        """Make or check what the workers need; returns facts for the run's record."""

    def loader(self, *, seed: int, epoch: int, rank: int, world_size: int, start: int = 0) -> Epoch:
        """Batches of one process from batch `start` of the epoch on."""


@dataclass(eq=False)
class RunLoader(Iterable[TrainBatch]):
    """All batches of a run for one process, from `position()` on.

    Attributes:
        open_epoch: Epoch and first batch to the batches of an epoch; the third argument numbers the
            draws, 0 unless processes, workers or batch size changed on the way.
        total: Batches of the whole run.
        position: Batches of the finished steps.
        identity: What else fixes the order of the batches.
        resampled: Whether other processes, workers or batch sizes may continue.
        seconds_waited: Time spent waiting for batches, in total.
        begun: Batches before the present draws.
    """

    open_epoch: Callable[[int, int, int], Epoch]
    total: int
    position: Callable[[], int]
    identity: dict[str, int]
    resampled: bool = False
    seconds_waited: float = field(default=0.0, init=False)
    begun: int = field(default=0, init=False)

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[TrainBatch]:
        epoch, start = divmod(self.position() - self.begun, self.batches_per_epoch)
        while True:
            batches = 0
            asked = time.perf_counter()
            for batch in self.open_epoch(epoch, start, self.begun):
                self.seconds_waited += time.perf_counter() - asked
                batches += 1
                yield batch
                asked = time.perf_counter()
            if batches != self.batches_per_epoch - start:
                raise RuntimeError(
                    f"epoch {epoch} gave {batches} batches from batch {start} on, expected "
                    f"{self.batches_per_epoch - start}; check the shards with `data verify`"
                )
            epoch, start = epoch + 1, 0

    @cached_property
    def batches_per_epoch(self) -> int:
        """Of this process."""
        return len(self.open_epoch(0, 0, 0))

    def state_dict(self) -> dict[str, int]:
        """What fixes the order of the batches; part of the checkpoint."""
        per_epoch = self.batches_per_epoch
        return {**self.identity, "batches_per_epoch": per_epoch, "begun": self.begun}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after a checkpoint's batches, or begin new draws where that is allowed.

        Raises:
            ValueError: If the order would be another one than the interrupted run's.
        """
        self.begun = state["begun"]
        differing = {
            key: f"{key} was {state.get(key)}, is {value}"
            for key, value in self.state_dict().items()
            if state.get(key) != value
        }
        if not differing:
            return
        changes = "; ".join(differing.values())
        if not (self.resampled and differing.keys() <= ELASTIC):
            reason = ""
            if "world_size" in differing:
                reason = ": data.resampled=false gives every process its own share of every epoch"
            elif differing.keys() & {"workers", "batch_size"}:
                reason = ": data.resampled=false fixes by these which samples come in which batch"
            raise ValueError(
                f"the run cannot continue on the same batches: {changes}{reason}. Resume with the "
                "settings it was started with, or start a new run with init_from="
            )
        if process_rank() == 0:
            logger.warning("%s: the run continues with new draws", changes)
            if differing.keys() != {"workers"}:
                logger.warning(
                    "a step now sees another number of pairs and negatives unless processes x "
                    "data.batch_size stays the same"
                )
        self.begun = self.position()


class CaptionDataModule(pl.LightningDataModule):
    """Prepares a caption source once per machine and hands out its batches.

    Args:
        source: Of the batches.
        seed: Of their order.
        on_prepared: Called with the facts that the source found, for the run's record.
    """

    def __init__(
        self,
        source: CaptionSource,
        *,
        seed: int,
        on_prepared: Callable[[dict[str, Any]], None] = lambda facts: None,
    ) -> None:
        super().__init__()
        self._source = source
        self._seed = seed
        self._on_prepared = on_prepared
        self._loader: RunLoader | None = None

    def prepare_data(self) -> None:
        """Make or check data and tagger, in one process of a machine, before workers start."""
        self._on_prepared(self._source.prepare())

    def train_dataloader(self) -> RunLoader:
        """Batches of the whole run, beginning after the last finished step.

        Raises:
            ValueError: An epoch is shorter than one batch; said before anything is measured.
        """
        assert self.trainer is not None
        trainer, source = self.trainer, self._source
        rank, world_size = trainer.global_rank, trainer.world_size
        per_step = trainer.accumulate_grad_batches

        def open_epoch(epoch: int, start: int, begun: int) -> Epoch:
            seed = self._seed
            if begun:  # new draws need another seed
                digest = hashlib.blake2b(f"{seed}/{begun}".encode(), digest_size=4).digest()
                seed = int.from_bytes(digest) >> 1
            return source.loader(
                seed=seed, epoch=epoch, rank=rank, world_size=world_size, start=start
            )

        self._loader = RunLoader(
            open_epoch,
            total=trainer.max_steps * per_step,
            position=lambda: trainer.global_step * per_step,
            identity={
                "seed": self._seed,
                "world_size": world_size,
                "workers": max(source.workers, 1),
                "batch_size": source.batch_size,
                "batches_per_step": per_step,
            },
            resampled=source.resampled,
        )
        _ = self._loader.batches_per_epoch
        return self._loader

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps of one pass over the data; 0 before the loader is made."""
        if self._loader is None or self.trainer is None:
            return 0.0
        return self._loader.batches_per_epoch / self.trainer.accumulate_grad_batches

    @property
    def seconds_waited(self) -> float:
        """Time this process spent waiting for batches, in total."""
        return self._loader.seconds_waited if self._loader else 0.0
