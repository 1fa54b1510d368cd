"""Which samples a loader worker reads, and in which order: a function of its numbers alone.

Resampled: each worker draws shards at random without end, so any number of processes and workers
serves any number of shards, and an epoch is what the settings say. Once: the shards, shuffled by
seed and epoch, are one long row that is cut into equal slices of whole batches, one per process
and worker; what is left over at the end (less than one batch per process) sits out this epoch.

Nothing here has a state that a checkpoint would have to save: the same (seed, epoch, rank, worker)
gives the same samples, so a run is resumed by asking for a later batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, count, cycle, islice

from webdataset.filters import shuffle as shuffle_buffer

from gradeclip_ft.data.samples import SUFFIXES
from gradeclip_ft.data.shards import (
    RawSample,
    Skips,
    TooManyDroppedError,
    read_shard,
    stable_hash,
)

MOST_BARREN_SHARDS = 100


@dataclass(frozen=True)
class LoaderWorker:
    """The numbers of one worker in one epoch; all its randomness comes from them.

    Attributes:
        seed: Of the run.
        epoch: From 0.
        rank: Of the process.
        world_size: Number of processes.
        worker: Of this process, from 0; batch b of the epoch comes from worker b modulo `workers`.
        workers: Per process, at least 1.
    """

    seed: int
    epoch: int
    rank: int
    world_size: int
    worker: int
    workers: int

    def key(self, purpose: str) -> int:
        """A seed for one purpose."""
        # Hashed: added up, seed 1 on rank 0 would draw what seed 0 draws on rank 1.
        return stable_hash(f"{purpose}/{self.seed}/{self.epoch}/{self.rank}/{self.worker}")

    def share(self, batches: int) -> int:
        """How many of a process's batches come from this worker.

        >>> [LoaderWorker(0, 0, 0, 1, worker, 3).share(8) for worker in range(3)]
        [3, 3, 2]
        """
        return len(range(self.worker, batches, self.workers))


def slice_of(worker: LoaderWorker, batches: int, batch_size: int) -> range:
    """Numbers of one worker's samples in the row of all; every process has as many batches."""
    # In batches, over the one row of all samples: whole processes before this one, then the
    # workers before this one, some of which have a batch more than others.
    before = worker.rank * batches + sum(
        len(range(number, batches, worker.workers)) for number in range(worker.worker)
    )
    return range(before * batch_size, (before + worker.share(batches)) * batch_size)


def resampled(
    urls: Sequence[str], worker: LoaderWorker, *, shuffle: int, skips: Skips
) -> Iterator[RawSample]:
    """Samples without end, from shards drawn at random.

    Raises:
        TooManyDroppedError: Shard after shard gives nothing.
    """
    samples = _endless(urls, random.Random(worker.key("shards")), skips)
    return _shuffled(samples, shuffle, random.Random(worker.key("samples")))


def each_sample_once(
    urls: Sequence[str],
    counts: Sequence[int],
    part: range,
    worker: LoaderWorker,
    *,
    shuffle: int,
    skips: Skips,
) -> Iterator[RawSample]:
    """The samples of a slice, each once; then, to make up for dropped ones, the slice again.

    The repetition keeps all processes in step: each gets its full number of batches, whatever
    cannot be read.

    Args:
        urls: Shards.
        counts: Samples per shard.
        part: Which samples are this worker's.
        worker: Which worker.
        shuffle: Size of the shuffle buffer; 0 keeps the order of the shards, too.
        skips: Counts what cannot be read.

    Raises:
        TooManyDroppedError: A whole pass gives nothing.
    """
    row = list(zip(urls, counts, strict=True))
    if shuffle:
        _generator_of_the_row(worker).shuffle(row)
    # A second pass only where samples were dropped: the first gives all that the slice has. Each is
    # shuffled on its own: a buffer across passes would bring repetitions early.
    for number in count():
        generator = random.Random(worker.key(f"pass{number}"))
        samples = chain.from_iterable(_pieces(row, part, skips))
        empty = True
        for sample in _shuffled(samples, shuffle, generator):
            empty = False
            yield sample
        if empty:
            raise _nothing(len(urls), skips)


def each_row_once(rows: int, part: range, worker: LoaderWorker) -> Iterator[int]:
    """Numbers of a slice of all rows in random order, each once; then the slice again, and again.

    The repetition makes up for dropped ones, as in `each_sample_once`.
    """
    row = list(range(rows))
    _generator_of_the_row(worker).shuffle(row)
    return cycle(row[part.start : part.stop])


def _generator_of_the_row(worker: LoaderWorker) -> random.Random:
    """From seed and epoch alone, without rank and worker: all of them must cut the same row."""
    return random.Random(stable_hash(f"row/{worker.seed}/{worker.epoch}"))


def _pieces(
    row: Sequence[tuple[str, int]], part: range, skips: Skips
) -> Iterator[Iterator[RawSample]]:
    ends = accumulate(size for _, size in row)
    for (url, size), end in zip(row, ends, strict=True):
        # The slice in this shard's own numbers; a shard that it does not touch is never opened.
        begin = end - size
        low, high = max(part.start - begin, 0), min(part.stop - begin, size)
        if low < high:
            yield islice(read_shard(url, skips, wanted=SUFFIXES), low, high)


def _endless(urls: Sequence[str], generator: random.Random, skips: Skips) -> Iterator[RawSample]:
    barren: set[str] = set()
    while True:
        url = generator.choice(urls)
        empty = True
        for sample in read_shard(url, skips, wanted=SUFFIXES):
            empty = False
            yield sample
        # Shards that give nothing must be different ones in a row: one of many may be damaged and
        # drawn often. Without this check a wrong folder would be read for ever.
        barren = barren | {url} if empty else set()
        if len(barren) >= min(len(urls), MOST_BARREN_SHARDS):
            raise _nothing(len(barren), skips)


def _shuffled(
    samples: Iterator[RawSample], size: int, generator: random.Random
) -> Iterator[RawSample]:
    if size < 2:
        return samples
    # `initial=size`: filled before the first sample leaves, so that the first samples of an epoch
    # are as well mixed as the others.
    mixed: Iterator[RawSample] = shuffle_buffer(size, initial=size, rng=generator)(samples)
    return mixed


def _nothing(shards: int, skips: Skips) -> TooManyDroppedError:
    return TooManyDroppedError(
        f"{shards} shards in a row held no sample that can be read ({skips.causes()}); "
        "see which with `data verify`"
    )
