"""How child processes may be started from where we are, and the loader that uses them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from gradeclip_ft.ops.stop_signals import heed_parent_alone


def in_foreign_worker() -> bool:
    """Whether this process was started by a method of somebody else, joblib's for example.

    Children that are spawned from such a process fail: they know that method no more than we do.
    """
    return multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods()


def once(
    items: Dataset[Any], join: Callable[[Any], Any], *, batch_size: int, workers: int
) -> DataLoader[Any]:
    """All items once, in order, in batches; leaves torch's global random state alone.

    Args:
        items: Samples by number.
        join: Samples to a batch.
        batch_size: Samples per batch; the last one may be smaller.
        workers: Processes; 0 loads here.
    """
    return DataLoader(
        items,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=join,
        generator=torch.Generator(),
        worker_init_fn=heed_parent_alone,
        multiprocessing_context="fork" if workers and in_foreign_worker() else None,
    )
