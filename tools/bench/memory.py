"""Peak memory of a training step, each variant in a process of its own."""

from __future__ import annotations

import resource
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from .publish import Section, publish
from .variants import GRAD_ECLIP, NAMES, OPEN_CLIP, make_steps

STEPS = 2  # the second one has the optimiser's state


def memory(
    *,
    model: str = "ViT-B-16",
    batch_size: int | None = None,
    phrases: int = 3,
    repeats: int = 3,
    threads: int = 1,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Most memory that two steps take: resident on a CPU, allocated on a GPU."""
    size = batch_size or (64 if device.startswith("cuda") else 8)
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(repeats):
        for name in NAMES:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                job = pool.submit(_peak, model, name, (size, phrases), threads, device)
                found[name].append(job.result())
    middle = {name: statistics.median(values) for name, values in found.items()}
    rows: dict[str, dict[str, float | str]] = {
        name: {
            "peak GiB": value,
            "against open_clip": value / middle[OPEN_CLIP],
            "processes": ", ".join(f"{each:.2f}" for each in found[name]),
        }
        for name, value in middle.items()
    }
    notes = [
        f"Batch of {size}, {phrases} phrases per caption, {STEPS} steps in a process of its own; "
        "median of the processes.",
        f"{GRAD_ECLIP} / {OPEN_CLIP}: {middle[GRAD_ECLIP] / middle[OPEN_CLIP]:.3f}",
    ]
    publish(Section(f"memory, {model}, {device}", rows, notes), out, threads=threads)


def _peak(model: str, name: str, shape: tuple[int, int], threads: int, device: str) -> float:
    """GiB; runs in a process that does nothing else."""
    torch.set_num_threads(threads)
    steps = make_steps(model, batch_size=shape[0], phrases=shape[1], device=device)
    for _ in range(STEPS):
        steps.run(name)
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
