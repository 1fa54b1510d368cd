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
        ...

    @property
    def batch_size(self) -> int:
        """Samples of a batch."""
        ...

    @property
    def resampled(self) -> bool:
        """Whether samples are drawn with replacement, so that no process has a share of its own."""
        ...

    def prepare(self) -> dict[str, Any]:
        """Make or check what the workers need; returns facts for the run's record."""
        ...

    def loader(self, *, seed: int, epoch: int, rank: int, world_size: int, start: int = 0) -> Epoch:
        """Batches of one process from batch `start` of the epoch on."""
        ...


class RunLoader(Iterable[TrainBatch]):
    """All batches of a run for one process, from `position()` on.

    Args:
        open_epoch: Epoch and first batch to the batches of an epoch; the third argument numbers the
            draws, 0 unless processes, workers or batch size changed on the way.
        total: Batches of the whole run.
        position: Batches of the finished steps.
        identity: What else fixes the order of the batches.
        resampled: Whether other processes, workers or batch sizes may continue.

    Attributes:
        seconds_waited: Time spent waiting for batches, in total.
    """

    def __init__(
        self,
        open_epoch: Callable[[int, int, int], Epoch],
        *,
        total: int,
        position: Callable[[], int],
        identity: dict[str, int],
        resampled: bool = False,
    ) -> None:
        self.seconds_waited = 0.0
        self._open = open_epoch
        self._total = total
        self._position = position
        self._identity = identity
        self._resampled = resampled
        self._begun = 0  # batches before the present draws

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[TrainBatch]:
        epoch, start = divmod(self._position() - self._begun, self._batches_per_epoch)
        while True:
            batches = 0
            begun = time.perf_counter()
            for batch in self._open(epoch, start, self._begun):
                self.seconds_waited += time.perf_counter() - begun
                batches += 1
                yield batch
                begun = time.perf_counter()
            if batches != self._batches_per_epoch - start:
                raise RuntimeError(
                    f"epoch {epoch} gave {batches} batches from batch {start} on, expected "
                    f"{self._batches_per_epoch - start}; check the shards with `data verify`"
                )
            epoch, start = epoch + 1, 0

    @cached_property
    def _batches_per_epoch(self) -> int:
        return len(self._open(0, 0, 0))

    def state_dict(self) -> dict[str, int]:
        """What fixes the order of the batches; part of the checkpoint."""
        fixed = {**self._identity, "batches_per_epoch": self._batches_per_epoch}
        return {**fixed, "begun": self._begun}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after a checkpoint's batches, or begin new draws where that is allowed.

        Raises:
            ValueError: If the order would be another one than the interrupted run's.
        """
        self._begun = state.get("begun", 0)
        differing = {
            key: f"{key} was {state.get(key)}, is {value}"
            for key, value in self.state_dict().items()
            if state.get(key, 0) != value
        }
        if not differing:
            return
        changes = "; ".join(differing.values())
        if not (self._resampled and differing.keys() <= ELASTIC):
            reason = ""
            if "world_size" in differing:
                reason = (
                    ": data.resampled=false gives every process its own share of every epoch, so "
                    "other processes would repeat some samples and leave out others"
                )
            elif differing.keys() & {"workers", "batch_size"}:
                reason = ": data.resampled=false fixes by these which samples come in which batch"
            raise ValueError(
                f"the run cannot continue on the same batches: {changes}{reason}. Resume with the "
                "settings it was started with, or start a new run with init_from="
            )
        pairs = (
            ". A step now sees another number of pairs and negatives unless processes x "
            "data.batch_size stays the same"
        )
        logger.log(
            logging.DEBUG if process_rank() else logging.WARNING,
            "%s: the run continues with new draws%s",
            changes,
            "" if differing.keys() == {"workers"} else pairs,
        )
        self._begun = self._position()


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
        """Batches of the whole run, beginning after the last finished step."""
        if self.trainer is None:
            raise RuntimeError(
                "the data module has no trainer yet; hand it to Trainer.fit(datamodule=...)"
            )
        trainer, source = self.trainer, self._source
        rank, world_size = trainer.global_rank, trainer.world_size
        per_step = trainer.accumulate_grad_batches

        def open_epoch(epoch: int, start: int, begun: int) -> Epoch:
            seed = self._seed if not begun else reseed(self._seed, begun)
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
        return self._loader

    @property
    def seconds_waited(self) -> float:
        """Time this process spent waiting for batches, in total."""
        return self._loader.seconds_waited if self._loader else 0.0


def reseed(seed: int, begun: int) -> int:
    """Seed of the draws that begin after so many batches."""
    digest = hashlib.blake2b(f"{seed}/{begun}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1
