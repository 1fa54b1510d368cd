"""A long epoch over shards with broken samples: is memory bounded, are the counts exact?

    python -m tools.soak samples=1000000

Writes shards of small JPEGs in which every 100th sample is broken, each in another way, and reads
them through the loader of training (decoding, augmenting, phrases, tokens). Prints the memory of
all processes at every tenth; exit code 1 if it grows by 50 MB or more after the first tenth, or if
a single count is not what was put in.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from gradeclip_ft.commands.cli import call
from gradeclip_ft.commands.config import perform, wants_traceback
from tools.damage import DAMAGES, Damage, good, pack, source

EVERY, PER_SHARD, BATCH = 100, 1000, 250
ALLOWED = 50.0  # MB


def soak(*, samples: int = 1_000_000, workers: int = 1, folder: Path | None = None) -> int:
    """Write, read, compare; see the module.

    samples=1000000   a multiple of 1,000 for each worker
    workers=1         loader processes
    folder=           for the shards, about 2.2 GB per million; default: a temporary one
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for first in range(0, samples, PER_SHARD):
            numbers = range(first, first + PER_SHARD)
            rows = ((f"{number:09d}", good(number), damage_of(number)) for number in numbers)
            pack(Path(place, f"part-{first // PER_SHARD:05d}.tar"), rows)
        print(f"{samples:,} samples in {samples // PER_SHARD:,} shards")
        print(f"every {EVERY}th is broken, in {len(DAMAGES)} ways in turn", flush=True)
        data = source(place, batch_size=BATCH, workers=workers)
        print(data.prepare(), flush=True)
        got: Counter[str] = Counter()
        memory: list[float] = []
        seen, begun = 0, time.perf_counter()
        for batch in data.loader(seed=0, epoch=0, rank=0, world_size=1):
            seen += len(batch.keys)
            got.update(batch.skipped)
            if seen * 10 // samples > len(memory):
                memory.append(megabytes())
                rate = seen / (time.perf_counter() - begun)
                print(f"{seen:>10,} samples {rate:6.0f}/s {memory[-1]:7.0f} MB", flush=True)
    growth, wanted = max(memory) - memory[0], expected(samples, workers)
    print(f"memory grew by {growth:.1f} MB after the first tenth, {ALLOWED:.0f} are allowed")
    for cause in sorted(wanted | got):
        print(f"{got[cause]:>8,} {cause}, {wanted[cause]:,} expected")
    print(f"{seen:,} usable samples of {samples:,} in the epoch; {got.total():,} counts")
    passed = seen == samples and got == wanted and growth < ALLOWED
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


def damage_of(number: int) -> Damage | None:
    """What is wrong with a sample; None for 99 in 100."""
    return DAMAGES[number // EVERY % len(DAMAGES)] if number % EVERY == EVERY // 2 else None


def expected(samples: int, workers: int) -> Counter[str]:
    """Counts by cause: each worker has a slice, and reads on from its start to fill its batches."""
    counts: Counter[str] = Counter()
    size = samples // workers
    for worker in range(workers):
        usable = number = 0
        while usable < size:
            damage = damage_of(worker * size + number % size)
            counts.update(damage.causes if damage else {})
            usable += damage is None or damage.usable
            number += 1
    return counts


def megabytes() -> float:
    """Resident memory of this process and its workers."""
    own = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    pages = sum(int(Path(f"/proc/{number}/statm").read_text().split()[1]) for number in own)
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


if __name__ == "__main__":
    sys.exit(perform(lambda: call(soak, sys.argv[1:]), full=wants_traceback()))
