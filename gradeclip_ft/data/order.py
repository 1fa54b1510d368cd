"""Which samples a worker reads, and in which order: a pure function of where it stands.

Resampled: each worker draws shards at random without end, so any number of processes and workers
serves any number of shards, and an epoch is what the settings say. Once: the shards, shuffled by
seed and epoch, are one long row that is cut into equal slices of whole batches, one per process
and worker; what is left over at the end (less than one batch per process) sits out this epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, count, islice

from webdataset.filters import shuffle as shuffle_buffer

from gradeclip_ft.data.shards import RawSample, Skips, read_shard, stable_hash

MOST_BARREN_SHARDS = 100


@dataclass(frozen=True)
class Place:
    """Where a worker stands; all its randomness comes from here.

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
        # Hashed: added up, seed 1 on rank 0 would draw what seed 0 draws on rank 1. And since all
        # randomness starts here, a resumed run needs no stored state of any generator.
        return stable_hash(f"{purpose}/{self.seed}/{self.epoch}/{self.rank}/{self.worker}")

    def share(self, batches: int) -> int:
        """How many of a process's batches come from this worker.

        >>> [Place(0, 0, 0, 1, worker, 3).share(8) for worker in range(3)]
        [3, 3, 2]
        """
        return len(range(self.worker, batches, self.workers))


@dataclass(frozen=True)
class Slice:
    """A worker's part of the row of all samples.

    Attributes:
        first: Number of its first sample.
        size: Number of its samples.
    """

    first: int
    size: int


def slice_of(place: Place, batches: int, batch_size: int) -> Slice:
    """The samples of one worker, where every process has the same number of batches."""
    # In batches, over the one row of all samples: whole processes before this one, then the
    # workers before this one, some of which have a batch more than others.
    before = place.rank * batches + sum(
        len(range(worker, batches, place.workers)) for worker in range(place.worker)
    )
    return Slice(before * batch_size, place.share(batches) * batch_size)


def resampled(
    urls: Sequence[str], place: Place, *, shuffle: int, skips: Skips
) -> Iterator[RawSample]:
    """Samples without end, from shards drawn at random.

    Raises:
        RuntimeError: Shard after shard gives nothing.
    """
    generator = random.Random(place.key("shards"))
    samples = _endless(urls, generator, skips)
    return _shuffled(samples, shuffle, random.Random(place.key("samples")))


def each_sample_once(
    urls: Sequence[str],
    counts: Sequence[int],
    part: Slice,
    place: Place,
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
        place: Where it stands.
        shuffle: Size of the shuffle buffer; 0 keeps the order of the shards, too.
        skips: Counts what cannot be read.

    Raises:
        RuntimeError: A whole pass gives nothing.
    """
    row = list(zip(urls, counts, strict=True))
    if shuffle:
        # From seed and epoch alone, without rank and worker: all of them must cut the same row.
        random.Random(stable_hash(f"row/{place.seed}/{place.epoch}")).shuffle(row)
    # A second pass only where samples were dropped: the first gives all that the slice has.
    for number in count():
        generator = random.Random(place.key(f"pass{number}"))
        samples = chain.from_iterable(_pieces(row, part, skips))
        empty = True
        for sample in _shuffled(samples, shuffle, generator):
            empty = False
            yield sample
        if empty:
            raise _nothing(len(urls), skips)


def _pieces(
    row: Sequence[tuple[str, int]], part: Slice, skips: Skips
) -> Iterator[Iterator[RawSample]]:
    ends = accumulate(size for _, size in row)
    for (url, size), end in zip(row, ends, strict=True):
        # The slice in this shard's own numbers; a shard that it does not touch is never opened.
        low = max(part.first - (end - size), 0)
        high = min(part.first + part.size - (end - size), size)
        if low < high:
            yield islice(read_shard(url, skips), low, high)


def _endless(urls: Sequence[str], generator: random.Random, skips: Skips) -> Iterator[RawSample]:
    barren: set[str] = set()
    while True:
        url = generator.choice(urls)
        empty = True
        for sample in read_shard(url, skips):
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


def _nothing(shards: int, skips: Skips) -> RuntimeError:
    return RuntimeError(
        f"{shards} shards in a row held no sample that can be read ({skips.causes()}); "
        "see which with `data verify`"
    )
