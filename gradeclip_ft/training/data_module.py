"""Caption data as Lightning wants it, with an exact position.

To Lightning the whole run is one pass of `max_steps` batches. Behind it stand the source's epochs,
each in an order fixed by seed and epoch. Where a pass begins follows from the number of finished
steps, so a resumed run goes on with the very batch that comes next, also in the middle of an epoch,
whatever was prefetched when it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl

from gradeclip_ft.batch import CaptionBatch


@runtime_checkable
class Epoch(Protocol):
    """Batches of one epoch; `len()` counts all of it, also where iteration begins later."""

    def __iter__(self) -> Iterator[CaptionBatch]: ...
    def __len__(self) -> int: ...


@runtime_checkable
class CaptionSource(Protocol):
    """Where caption batches come from; an epoch's order depends on `loader`'s arguments alone."""

    def prepare(self) -> dict[str, Any]:
        """Make or check what the workers need; returns facts for the run's record."""
        ...

    def loader(self, *, seed: int, epoch: int, rank: int, world_size: int, start: int = 0) -> Epoch:
        """Batches of one process from batch `start` of the epoch on."""
        ...


class RunLoader(Iterable[CaptionBatch]):
    """All batches of a run for one process, from `position()` on.

    Attributes:
        seconds_waited: Time spent waiting for batches, in total.
    """

    def __init__(
        self,
        open_epoch: Callable[[int, int], Epoch],
        *,
        total: int,
        position: Callable[[], int],
        identity: dict[str, int],
    ) -> None:
        self.seconds_waited = 0.0
        self._open = open_epoch
        self._total = total
        self._position = position
        self._identity = identity

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[CaptionBatch]:
        epoch, start = divmod(self._position(), self.batches_per_epoch)
        while True:
            batches = 0
            for batch in self._timed(self._open(epoch, start)):
                batches += 1
                yield batch
            if batches != self.batches_per_epoch - start:
                raise RuntimeError(
                    f"epoch {epoch} gave {batches} batches from batch {start} on, expected "
                    f"{self.batches_per_epoch - start}; check the shards with `data verify`"
                )
            epoch, start = epoch + 1, 0

    def _timed(self, batches: Iterable[CaptionBatch]) -> Iterator[CaptionBatch]:
        begun = time.perf_counter()
        for batch in batches:
            self.seconds_waited += time.perf_counter() - begun
            yield batch
            begun = time.perf_counter()

    @cached_property
    def batches_per_epoch(self) -> int:
        """Batches of a full epoch of this process."""
        return len(self._open(0, 0))

    def state_dict(self) -> dict[str, int]:
        """What fixes the order of the batches; enters the checkpoint."""
        return {**self._identity, "batches_per_epoch": self.batches_per_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Compares with a checkpoint's state.

        Raises:
            ValueError: If the order would be another one than the interrupted run's.
        """
        differing = [
            f"{key} was {state.get(key)}, is {value}"
            for key, value in self.state_dict().items()
            if state.get(key) != value
        ]
        if differing:
            raise ValueError(
                f"the run cannot continue on the same batches: {'; '.join(differing)}. "
                "Resume with the settings it was started with, or start a new run with init_from="
            )


class CaptionDataModule(pl.LightningDataModule):
    """Prepares a caption source once per machine and hands out its batches.

    Attributes:
        on_prepared: Called with the facts that the source found, for the run's record.
    """

    def __init__(self, source: CaptionSource, *, seed: int) -> None:
        super().__init__()
        self.source = source
        self.seed = seed
        self.on_prepared: Callable[[dict[str, Any]], None] = lambda facts: None
        self._loader: RunLoader | None = None

    def prepare_data(self) -> None:
        """Makes or checks data and tagger, in one process of a machine, before workers start."""
        self.on_prepared(self.source.prepare())

    def train_dataloader(self) -> RunLoader:
        """Batches of the whole run, beginning behind the last finished step."""
        trainer = self._trainer()
        rank, world_size = trainer.global_rank, trainer.world_size
        per_step = trainer.accumulate_grad_batches

        def open_epoch(epoch: int, start: int) -> Epoch:
            return self.source.loader(
                seed=self.seed, epoch=epoch, rank=rank, world_size=world_size, start=start
            )

        self._loader = RunLoader(
            open_epoch,
            total=trainer.max_steps * per_step,
            position=lambda: trainer.global_step * per_step,
            identity={"seed": self.seed, "world_size": world_size, "batches_per_step": per_step},
        )
        return self._loader

    @property
    def seconds_waited(self) -> float:
        """Time this process spent waiting for batches, in total."""
        return self._loader.seconds_waited if self._loader else 0.0

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError(
                "the data module has no trainer yet; hand it to Trainer.fit(datamodule=...)"
            )
        return self.trainer
