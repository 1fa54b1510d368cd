"""Loaders and their worker processes: how they start, and how their errors reach the user."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from gradeclip_ft.data.shards import TooManyDroppedError
from gradeclip_ft.ops.distributed import ignore_scheduler_signals, scheduler_signals_held

EXPECTED = (FileNotFoundError, OSError, ValueError, TooManyDroppedError)
"""Errors about data, whose text says all; torch shows the origin of others."""

ADVICE = "If memory ran out, lower workers= or data.shuffle=; resume=auto continues a training run"


def evaluation_loader(
    items: Dataset[Any], join: Callable[[Any], Any], *, batch_size: int, workers: int
) -> DataLoader[Any]:
    """All items once, in order, in batches; leaves torch's global random state alone.

    Args:
        items: Samples by number.
        join: Samples to a batch.
        batch_size: Samples per batch; the last one may be smaller.
        workers: Processes; 0 loads here.
    """
    return RaisingLoader(
        _Items(items),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=partial(_joined, join),
        generator=torch.Generator(),
        worker_init_fn=ignore_scheduler_signals,
        multiprocessing_context="fork" if workers and inside_joblib_worker() else None,
    )


def inside_joblib_worker() -> bool:
    """Whether this process was started by a method of somebody else, joblib's for example.

    Spawning from such a worker fails, because its start method is not available in the child.
    """
    return multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods()


@dataclass(frozen=True)
class WorkerError:
    """An expected error of a worker on its way to the process that waits for its batch.

    torch would wrap it in the traceback of the worker. Only kind and text travel: not every error
    can be pickled.
    """

    kind: type[Exception]
    message: str


def handed_over(error: Exception) -> WorkerError:
    """What a worker gives instead of a batch; raises the error where there is no worker."""
    if get_worker_info() is None:
        raise error
    return WorkerError(next(kind for kind in EXPECTED if isinstance(error, kind)), str(error))


def raising(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches; an error that came in place of one is raised here.

    Raises:
        RuntimeError: A worker was killed.
    """
    with naming_killed_workers():
        for batch in batches:
            if isinstance(batch, WorkerError):
                raise batch.kind(batch.message)
            yield batch


@contextmanager
def naming_killed_workers() -> Iterator[None]:
    """Adds what to do to torch's error, which comes at any point: a signal handler raises it."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker") or ADVICE in str(error):
            raise
        raise RuntimeError(f"{error} {ADVICE}") from error


class RaisingLoader(DataLoader[Any]):
    """Raises what workers hand over, and starts them so that a scheduler's signals spare them."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with scheduler_signals_held():
            batches = super().__iter__()
        return raising(batches)


@dataclass(frozen=True)
class _Items(Dataset[Any]):
    items: Any

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.items[number]
        except EXPECTED as error:
            return handed_over(error)


def _joined(join: Callable[[Any], Any], items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, WorkerError)), None) or join(items)
