"""Caption data as Lightning wants it, with an exact position.

To Lightning the whole run is one pass of `max_steps` batches. Behind it stand the source's epochs,
each in an order fixed by seed and epoch. Where a pass begins follows from the number of finished
steps, so a resumed run goes on with the very batch that comes next, also in the middle of an epoch,
whatever was prefetched when it stopped. Where samples are drawn with replacement, a run may also go
on with other processes, workers or batch sizes: it then begins new draws, and counts epochs from
there.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.ops.distributed import rank as process_rank

ELASTIC = ("world_size", "workers", "batch_size", "batches_per_epoch")
"""What may change where samples are drawn with replacement; the draws are then new ones."""
PAIRS = (
    ". A step now sees another number of pairs and negatives unless processes x data.batch_size "
    "stays the same"
)
logger = logging.getLogger(__name__)


@runtime_checkable
class Epoch(Protocol):
    """Batches of one epoch; `len()` counts all of it, also where iteration begins later."""

    def __iter__(self) -> Iterator[CaptionBatch]: ...
    def __len__(self) -> int: ...


@runtime_checkable
class CaptionSource(Protocol):
    """Where caption batches come from; an epoch's order depends on what stands here alone."""

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


class RunLoader(Iterable[CaptionBatch]):
    """All batches of a run for one process, from `position()` on.

    Args:
        open_epoch: Epoch and first batch to the batches of an epoch; the third argument numbers the
            draws, 0 unless processes, workers or batch size changed on the way.
        total: Batches of the whole run.
        position: Batches behind the finished steps.
        identity: What else fixes the order of the batches.
        resampled: Whether other processes, workers or batch sizes may go on.

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

    def __iter__(self) -> Iterator[CaptionBatch]:
        epoch, start = divmod(self._position() - self._begun, self.batches_per_epoch)
        while True:
            batches = 0
            for batch in self._timed(self._open(epoch, start, self._begun)):
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
        return len(self._open(0, 0, 0))

    def state_dict(self) -> dict[str, int]:
        """What fixes the order of the batches; enters the checkpoint."""
        fixed = {**self._identity, "batches_per_epoch": self.batches_per_epoch}
        return {**fixed, "begun": self._begun}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on behind a checkpoint's batches, or begins new draws where that is allowed.

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
        if not (self._resampled and differing.keys() <= set(ELASTIC)):
            raise ValueError(_refusal(differing))
        logger.log(
            logging.DEBUG if process_rank() else logging.WARNING,
            "%s: the run goes on with new draws%s",
            "; ".join(differing.values()),
            "" if differing.keys() == {"workers"} else PAIRS,
        )
        self._begun = self._position()


def _refusal(differing: Mapping[str, str]) -> str:
    reason = (
        ": data.resampled=false gives every process its own share of every epoch, so other "
        "processes would repeat some samples and leave out others"
        if "world_size" in differing
        else ": data.resampled=false fixes by these which samples come in which batch"
        if differing.keys() & {"workers", "batch_size"}
        else ""
    )
    return (
        f"the run cannot continue on the same batches: {'; '.join(differing.values())}{reason}. "
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

        def open_epoch(epoch: int, start: int, begun: int) -> Epoch:
            seed = _fresh(self.seed, begun) if begun else self.seed
            return self.source.loader(
                seed=seed, epoch=epoch, rank=rank, world_size=world_size, start=start
            )

        self._loader = RunLoader(
            open_epoch,
            total=trainer.max_steps * per_step,
            position=lambda: trainer.global_step * per_step,
            identity={
                "seed": self.seed,
                "world_size": world_size,
                "workers": max(self.source.workers, 1),
                "batch_size": self.source.batch_size,
                "batches_per_step": per_step,
            },
            resampled=self.source.resampled,
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


def _fresh(seed: int, begun: int) -> int:
    """Seed of the draws that begin behind so many batches."""
    digest = hashlib.blake2b(f"{seed}/{begun}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1
