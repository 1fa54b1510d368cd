"""All-gather with gradient, also of row counts that differ between processes; long waits."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

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
    """A barrier for work that one process does while the others wait. All processes make it.

    It has a process group of its own: the ordinary collectives keep a short limit, behind which a
    process that hangs is given up. Over gloo, a process that dies ends the wait at once.
    """
    if world_size() == 1:
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=patience)

    def wait() -> None:
        dist.barrier(group)  # type: ignore[arg-type]

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
