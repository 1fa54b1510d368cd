"""Time of a training step beside open_clip's, and how it grows with phrases and batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from .clock import device_clock, in_turns
from .gpu import gpu_columns
from .publish import Section, publish
from .variants import (
    GRAD_ECLIP,
    NAMES,
    OPEN_CLIP,
    ORDINARY,
    PUBLISHED,
    PUBLISHED_77,
    Steps,
    make_steps,
)

RATIOS = (
    (GRAD_ECLIP, OPEN_CLIP),
    (GRAD_ECLIP, ORDINARY),
    (PUBLISHED, GRAD_ECLIP),
    (PUBLISHED_77, GRAD_ECLIP),
)


def step(
    *,
    model: str = "ViT-B-16",
    batch_size: int | None = None,
    phrases: int = 3,
    rounds: int = 7,
    threads: int = 1,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Forward, backward and optimiser of one batch: open_clip's way, and ours in four ways."""
    torch.set_num_threads(threads)
    size = batch_size or (64 if device.startswith("cuda") else 8)
    steps = make_steps(model, batch_size=size, phrases=phrases, device=device)
    variants = {name: partial(steps.run, name) for name in NAMES}
    turns = in_turns(variants, rounds=rounds, now=device_clock(device))
    rows: dict[str, dict[str, float | str]] = {
        name: {"seconds": turns.median(name), **_gpu(steps, name, turns.median(name))}
        for name in NAMES
    }
    rows |= turns.compared(RATIOS)
    publish(Section(f"step, {model}, {device}", rows, _notes(steps, rounds)), out, threads=threads)


def scaling(
    *,
    model: str = "ViT-B-16",
    phrases: tuple[int, ...] = (0, 1, 3, 5, 10),
    batches: tuple[int, ...] = (4, 16),
    rounds: int = 7,
    threads: int = 1,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """The Grad-ECLIP step against phrases per caption at batch 8, and against the batch."""
    torch.set_num_threads(threads)
    steps = make_steps(model, batch_size=8, phrases=max(phrases), device=device)
    points = {f"{count} phrases": (8, count) for count in phrases}
    points |= {f"batch {size}, 3 phrases": (size, 3) for size in batches}
    variants = {
        name: partial(steps.with_batch(*point).run, GRAD_ECLIP) for name, point in points.items()
    }
    turns = in_turns(variants, rounds=rounds, now=device_clock(device))
    base = "1 phrases"
    rows: dict[str, dict[str, float | str]] = {
        name: {
            "seconds": turns.median(name),
            "per image": turns.median(name) / size,
            "against 1 phrase": turns.ratio(name, base),
            "rounds": turns.spread(name, base),
        }
        for name, (size, _) in points.items()
    }
    title = f"scaling, {model}, {device}"
    publish(Section(title, rows, _notes(steps, rounds)), out, threads=threads)


def _gpu(steps: Steps, name: str, seconds: float) -> dict[str, float | str]:
    if steps.batch.images.device.type != "cuda":
        return {}
    return gpu_columns(partial(steps.run, name), seconds, steps.tokens(name))


def _notes(steps: Steps, rounds: int) -> list[str]:
    batch = steps.batch
    clock = "CPU seconds of the process" if batch.images.device.type == "cpu" else "seconds"
    return [
        f"Batch of {len(batch.images)}, {len(batch.phrase)} phrases ({len(batch.distinct)} "
        f"distinct); {steps.source}; random weights, "
        f"{'fp32' if steps.precision is None else 'bf16 autocast'}.",
        f"{clock}; medians over {rounds} rounds in turns behind one round of warm-up.",
        "Ours includes the trainer's look at the gradient norm and clipping; open_clip's has none.",
    ]
