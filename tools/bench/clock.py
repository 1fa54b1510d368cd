"""How long things take: variants in turns, so that other work on the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Turns:
    """Seconds of every variant, round by round.

    Attributes:
        seconds: By variant, one number per round.
    """

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of a variant."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Median over the rounds of a variant's seconds divided by another one's."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(mine / other for mine, other in pairs)

    def spread(self, name: str, base: str) -> str:
        """Smallest and largest of these ratios."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        ratios = [mine / other for mine, other in pairs]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    def compared(self, pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, float | str]]:
        """A row for each variant and its base, with ratio and spread."""
        return {
            f"{name} / {base}": {"ratio": self.ratio(name, base), "rounds": self.spread(name, base)}
            for name, base in pairs
        }


def in_turns(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    now: Callable[[], float],
) -> Turns:
    """Run every variant once per round, forwards and backwards in turn.

    Args:
        variants: What to measure.
        rounds: Measured rounds.
        warmup: Rounds before these, not counted.
        now: The clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-warmup, rounds):
        order = list(variants.items())
        for name, run in order if number % 2 == 0 else reversed(order):
            start = now()
            run()
            if number >= 0:
                seconds[name].append(now() - start)
    return Turns(seconds)


def cpu_seconds() -> float:
    """The process's own seconds on the CPU, all its threads: other programs do not count."""
    return time.process_time()


def device_clock(device: str) -> Callable[[], float]:
    """CPU seconds on a CPU; on a GPU those of the wall, when it has finished."""
    return _gpu_seconds if device.startswith("cuda") else cpu_seconds


def _gpu_seconds() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
