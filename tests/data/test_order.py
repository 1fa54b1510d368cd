"""Who reads which samples: slices, draws, and what happens when nothing can be read."""

import doctest
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from gradeclip_ft.data import order
from gradeclip_ft.data.order import LoaderWorker, each_sample_once, resampled, slice_of
from gradeclip_ft.data.shards import Skips

Make = Callable[..., list[Path]]


def place(
    rank: int = 0, worker: int = 0, *, workers: int = 1, world: int = 1, epoch: int = 0
) -> LoaderWorker:
    return LoaderWorker(7, epoch, rank, world, worker, workers)


def names(raws: object) -> list[str]:
    return [raw["__key__"] for raw in raws]  # type: ignore[attr-defined]


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(order).failed == 0


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("batches", [1, 5, 8])
def test_slices_tile_the_row_of_samples(world: int, workers: int, batches: int) -> None:
    """No sample twice, none left out before the end, the same number for every process."""
    taken: list[int] = []
    for rank in range(world):
        parts = [
            slice_of(place(rank, worker, workers=workers, world=world), batches, 3)
            for worker in range(workers)
        ]
        assert sum(map(len, parts)) == batches * 3
        taken += itertools.chain(*parts)
    assert taken == list(range(world * batches * 3))


def test_every_sample_comes_once_per_epoch(tmp_path: Path, make_shards: Make) -> None:
    sizes = [5, 9, 2, 8]
    urls = [str(path) for path in make_shards(tmp_path, sizes=sizes)]
    orders = []
    for epoch in range(2):
        seen: list[str] = []
        for rank, worker in itertools.product(range(2), range(2)):
            where = place(rank, worker, workers=2, world=2, epoch=epoch)
            part = slice_of(where, 4, 3)
            stream = each_sample_once(urls, sizes, part, where, shuffle=5, skips=Skips())
            seen += names(itertools.islice(stream, len(part)))
        assert sorted(seen) == [f"{number:09d}" for number in range(24)]
        orders.append(seen)
    assert orders[0] != orders[1]


def test_without_shuffling_samples_come_in_the_order_of_the_shards(
    tmp_path: Path, make_shards: Make
) -> None:
    urls = [str(path) for path in make_shards(tmp_path, sizes=[3, 3])]
    part = slice_of(place(), 3, 2)
    stream = each_sample_once(urls, [3, 3], part, place(), shuffle=0, skips=Skips())
    assert names(itertools.islice(stream, 6)) == [f"{number:09d}" for number in range(6)]


def test_a_short_slice_is_repeated_only_when_it_is_used_up(
    tmp_path: Path, make_shards: Make
) -> None:
    """A shuffle buffer that runs over the end of a pass would bring some samples twice early."""
    urls = [str(path) for path in make_shards(tmp_path, sizes=[6])]
    stream = each_sample_once(
        urls, [8], slice_of(place(), 2, 4), place(), shuffle=100, skips=Skips()
    )
    seen = names(itertools.islice(stream, 12))
    assert sorted(seen[:6]) == sorted(seen[6:]) == [f"{number:09d}" for number in range(6)]
    assert seen[:6] != seen[6:]


def test_resampled_draws_are_even_endless_and_repeatable(tmp_path: Path, make_shards: Make) -> None:
    urls = [str(path) for path in make_shards(tmp_path, sizes=[2] * 5)]

    def draw(where: LoaderWorker, count: int = 1000) -> list[str]:
        return names(itertools.islice(resampled(urls, where, shuffle=4, skips=Skips()), count))

    seen = draw(place())
    assert seen[:200] == draw(place(), 200)
    counts = Counter(seen)
    assert len(counts) == 10
    assert min(counts.values()) > 60  # of 100 expected; 4.5 standard deviations of 9
    others = [place(rank=1, world=2), place(worker=1, workers=2), place(epoch=1)]
    assert all(draw(other, 20) != seen[:20] for other in others)


def test_one_good_shard_among_broken_ones_is_enough(tmp_path: Path, make_shards: Make) -> None:
    (good,) = make_shards(tmp_path, sizes=[3])
    urls = [str(good), *(str(tmp_path / f"none-{n}.tar") for n in range(9))]
    skips = Skips()
    assert (
        len(names(itertools.islice(resampled(urls, place(), shuffle=0, skips=skips), 300))) == 300
    )
    assert skips.total["unreadable_shard"] > 100


def test_only_broken_shards_end_with_an_error(tmp_path: Path) -> None:
    """A loader that kept drawing would hang silently."""
    urls = [str(tmp_path / f"none-{n}.tar") for n in range(5)]
    with pytest.raises(RuntimeError, match=r"5 shards in a row .*unreadable_shard .*data verify"):
        next(resampled(urls, place(), shuffle=10, skips=Skips()))
    stream = each_sample_once(
        urls, [4] * 5, slice_of(place(), 2, 2), place(), shuffle=0, skips=Skips()
    )
    with pytest.raises(RuntimeError, match="held no sample"):
        next(stream)
