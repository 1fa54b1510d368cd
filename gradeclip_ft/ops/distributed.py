"""All-gather with gradient, also of row counts that differ between processes; long waits."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def world_size() -> int:
    """Number of processes; 1 where no process group exists."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process; 0 where no process group exists."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def anywhere(here: bool, device: torch.device) -> bool:
    """Whether it is so in any process. A collective: all processes call it."""
    if world_size() == 1:
        return here
    found = torch.tensor(float(here), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def patient_barrier(patience: timedelta) -> Callable[[], None]:
    """A barrier for work that one process does while the others wait. All processes call it.

    It has a process group of its own, made at the first call: the ordinary collectives keep a short
    limit, after which a process that hangs is given up. Over gloo, a process that dies ends the
    wait at once.
    """
    groups: list[Any] = []

    def wait() -> None:
        if world_size() == 1:
            return
        if not groups:
            groups.append(dist.new_group(backend="gloo", timeout=patience))
        dist.barrier(groups[0])

    return wait


def row_counts(rows: int, device: torch.device) -> list[int]:
    """Number of rows that every process holds. A collective: all processes call it."""
    if world_size() == 1:
        return [rows]
    mine = torch.tensor([rows], device=device)
    counts = [torch.zeros_like(mine) for _ in range(world_size())]
    dist.all_gather(counts, mine)
    return torch.cat(counts).tolist()


def gather_rows(x: Shaped[Tensor, "rows ..."], counts: list[int]) -> Shaped[Tensor, "all_rows ..."]:
    """Rows of all processes in order of rank; floating tensors keep their gradient.

    Every process runs the same collective whatever its count, so a process without rows does not
    stop the others.

    Args:
        x: Rows of this process.
        counts: Result of `row_counts`.
    """
    if len(counts) == 1:
        return x
    most = max(counts)
    padding = x.new_zeros((most - x.shape[0], *x.shape[1:]))
    padded = torch.cat([x, padding]).contiguous()
    if x.is_floating_point():
        parts = list(all_gather(padded))  # type: ignore[no-untyped-call]
    else:
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


# By which a scheduler says that the job's time is over.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def scheduler_signals_held() -> Iterator[None]:
    """Around the start of loader workers: none of their threads takes a scheduler's signals.

    Libraries may start threads in a fork before `ignore_scheduler_signals` runs there. They inherit
    what is blocked now; unblocked, they would take the signals that its thread waits for.
    """
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_scheduler_signals(worker: int) -> None:
    """Start of a loader worker: it exits only when its parent asks or dies.

    A scheduler may signal all processes of a job, and a terminal sends Ctrl-C to all of them; the
    step that the parent wants to finish and save needs its workers. Commands that a worker starts
    for `pipe:` inherit this. Systems that do not tell who sent a signal (macOS, Windows) keep
    torch's way: a worker ends on SIGTERM.

    Args:
        worker: Its number; all are alike.
    """
    del worker
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    # Blocked in every thread, see `scheduler_signals_held`: they come to the thread below.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_for, args=(parent.pid,), daemon=True).start()


def _exit_for(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(SIGNALS)
        if received.si_pid == parent and received.si_signo == signal.SIGTERM:
            os._exit(0)
