"""Batches: their content, their order in every arrangement of processes, and resuming."""

import itertools
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.data import captions
from gradeclip_ft.data.captions import CaptionTrainData
from gradeclip_ft.data.shards import TooManyDroppedError, stable_hash
from gradeclip_ft.text import phrases

Make = Callable[..., list[Path]]
Write = Callable[..., Path]
Files = Callable[..., dict[str, bytes]]
Source = Callable[..., CaptionTrainData]
BROKEN = (3, 9, 10, 17, 30)


def epoch_of(source: CaptionTrainData, **place: int) -> list[CaptionBatch]:
    return list(source.loader(**{"seed": 1, "epoch": 0, "rank": 0, "world_size": 1, **place}))


def keys(batches: list[CaptionBatch]) -> list[str]:
    return [key.split(":")[1] for batch in batches for key in batch.keys]


def assert_same(first: list[CaptionBatch], second: list[CaptionBatch]) -> None:
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert one.keys == two.keys
        for name in ("images", "captions", "distinct", "identity", "phrase", "owner"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name


@pytest.fixture
def shards(tmp_path: Path, make_shards: Make) -> str:
    """48 samples, 5 of them with a broken picture, in 4 shards."""
    make_shards(tmp_path, sizes=[12] * 4, broken=BROKEN)
    return str(tmp_path)


def test_a_batch_holds_what_the_samples_say(
    tmp_path: Path, sample: Files, write_shard: Write, source: Source
) -> None:
    captions = ["a dog near a black cat", "and of the", "a black cat", "a dog and a dog"]
    write_shard(tmp_path / "a.tar", [sample(n, text) for n, text in enumerate(captions)])
    data = source(str(tmp_path), resampled=False, shuffle=0)
    (batch,) = epoch_of(data)
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.keys == tuple(f"a.tar:00000000{n}" for n in range(4))
    assert torch.equal(batch.captions, data.tokenizer(captions, trim=True))
    prompts = ["This is a photo of the dog", "This is a photo of the black cat"]
    assert torch.equal(batch.distinct, data.tokenizer(prompts, trim=True))
    assert batch.distinct.shape[1] == 16  # 9 tokens of 24, rounded up to a multiple of 8
    assert batch.identity.tolist() == [stable_hash("dog"), stable_hash("black cat")]
    assert batch.phrase.tolist() == [0, 1, 1, 0]
    assert batch.owner.tolist() == [0, 0, 2, 3]
    assert batch.skipped == {}


@pytest.mark.parametrize("options", [{"max_phrases": 0}, {}])
def test_a_batch_without_phrases_has_empty_tensors(
    tmp_path: Path, sample: Files, write_shard: Write, source: Source, options: dict[str, int]
) -> None:
    write_shard(tmp_path / "a.tar", [sample(n, "and of the") for n in range(4)])
    (batch,) = epoch_of(source(str(tmp_path), resampled=False, **options))
    assert batch.distinct.shape == (0, 8)
    assert batch.identity.shape == batch.phrase.shape == batch.owner.shape == (0,)
    assert batch.distinct.dtype == batch.phrase.dtype == torch.long
    assert batch.captions.shape[0] == 4


@pytest.mark.parametrize("workers", [0, 3])
def test_every_sample_once_whatever_the_number_of_workers(
    shards: str, source: Source, workers: int
) -> None:
    data = source(shards, resampled=False, workers=workers, batch_size=3)
    batches = epoch_of(data)
    assert len(batches) == len(data.loader(seed=1, epoch=0, rank=0, world_size=1)) == 16
    good = {f"{n:09d}" for n in range(48) if n not in BROKEN}
    assert set(keys(batches)) == good
    # 43 good samples fill 48 places: a worker repeats some of its own instead of the broken ones
    assert max(Counter(keys(batches)).values()) <= 2


def test_an_empty_shard_is_named_before_the_run(
    tmp_path: Path, make_shards: Make, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no part in any slice, so nothing opened it, and the epoch was shorter in silence."""
    paths = make_shards(tmp_path, sizes=[6, 6, 6])
    paths[1].write_bytes(b"")
    data = source(str(tmp_path), resampled=False)
    assert data.prepare()["samples_per_epoch"] == 12
    assert "1 of 3 shards hold no sample, first" in caplog.text
    assert sorted(keys(epoch_of(data))) == [f"{n:09d}" for n in (*range(6), *range(12, 18))]


@pytest.mark.parametrize("resampled", [True, False])
def test_processes_have_equal_lengths_and_do_not_share_samples(
    shards: str, source: Source, resampled: bool
) -> None:
    data = source(shards, resampled=resampled, workers=2, samples_per_epoch=48)
    parts = [epoch_of(data, rank=rank, world_size=2) for rank in range(2)]
    assert [len(part) for part in parts] == [6, 6]
    if not resampled:
        assert not set(keys(parts[0])) & set(keys(parts[1]))
    else:
        assert keys(parts[0]) != keys(parts[1])


@pytest.mark.parametrize(
    ("workers", "resampled", "starts"),
    [(0, True, range(10)), (0, False, range(10)), (2, False, (1, 8)), (3, True, (4,))],
)
def test_beginning_at_any_batch_gives_the_uninterrupted_epoch(
    shards: str, source: Source, workers: int, resampled: bool, starts: Sequence[int]
) -> None:
    """Pictures are cropped at random and some samples are broken: neither may shift the rest."""
    data = source(shards, resampled=resampled, workers=workers, samples_per_epoch=36)
    whole = epoch_of(data, epoch=2)
    assert len(whole) == 9
    for start in starts:
        assert_same(epoch_of(data, epoch=2, start=start), whole[start:])


def test_skipped_counts_survive_a_resume(shards: str, source: Source) -> None:
    data = source(shards, resampled=False, shuffle=0, batch_size=5)
    whole = epoch_of(data)
    counted = sum(batch.skipped.get("broken_image", 0) for batch in whole)
    assert counted >= len(BROKEN)  # one may be met again when a slice is repeated to fill up
    resumed = epoch_of(data, start=3)
    assert [batch.skipped for batch in resumed] == [batch.skipped for batch in whole[3:]]


def test_epochs_and_seeds_differ_and_repeat(shards: str, source: Source) -> None:
    """And leave the process's random numbers alone: dropout would depend on the workers."""
    state = torch.get_rng_state()
    data = source(shards, samples_per_epoch=24)
    first = epoch_of(data)
    assert_same(first, epoch_of(data))
    assert keys(first) != keys(epoch_of(data, epoch=1))
    assert keys(first) != keys(epoch_of(data, seed=2))
    epoch_of(source(shards, samples_per_epoch=8, workers=1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_workers_may_be_spawned(shards: str, source: Source) -> None:
    """Python 3.14 no longer forks by default: everything must pickle. What makes data need not."""
    data = source(shards, samples_per_epoch=8, workers=1, make=lambda: shards)
    forked, method = epoch_of(data), multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert_same(forked, epoch_of(data))
    finally:
        multiprocessing.set_start_method(method, force=True)


def test_phrases_of_the_json_are_used_if_made_the_same_way(
    tmp_path: Path, sample: Files, write_shard: Write, source: Source
) -> None:
    text = "a black dog"

    def entry(**changes: Any) -> dict[str, Any]:
        made = {"rule": phrases.RULE, "tagger": "textblob", "max_phrases": 5}
        return {**made, "found": {text: ["stored", "more"]}, **changes}

    records = [
        entry(),
        entry(tagger="nltk"),
        entry(max_phrases=1),
        entry(rule="old"),
        entry(found={"another caption": ["stored"]}),
        entry(found=[]),
        ["dog"],
    ]
    rows = [sample(n, text, phrases=record) for n, record in enumerate(records)]
    write_shard(tmp_path / "a.tar", rows)
    data = source(str(tmp_path), resampled=False, shuffle=0, batch_size=7, max_phrases=2)
    (batch,) = epoch_of(data)
    assert batch.identity.tolist() == [stable_hash(t) for t in ("stored", "more", "black dog")]
    assert batch.phrase.tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert batch.owner.tolist() == [0, 0, 1, 2, 3, 4, 5, 6]


def test_any_caption_changes_with_the_epoch(
    tmp_path: Path, sample: Files, write_shard: Write, source: Source
) -> None:
    several = [f"a black {animal}" for animal in ("dog", "cat", "cow", "bird")]
    rows = [sample(n, "a horse", captions=several) for n in range(8)]
    write_shard(tmp_path / "a.tar", rows)
    data = source(str(tmp_path), resampled=False, caption="any", batch_size=8)
    drawn = [epoch_of(data, epoch=epoch)[0].identity.tolist() for epoch in range(4)]
    assert set(itertools.chain(*drawn)) == {stable_hash(text[2:]) for text in several}
    assert len({tuple(entry) for entry in drawn}) > 1


@pytest.mark.parametrize("workers", [0, 1])
def test_only_broken_samples_end_with_an_error(
    tmp_path: Path,
    write_shard: Write,
    source: Source,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A loader that kept looking would hang silently."""
    monkeypatch.setattr(captions, "MOST_BAD_SAMPLES", 500)
    write_shard(tmp_path / "a.tar", [{"x.txt": b"a dog"}, {"y.txt": b"a cat"}])
    data = source(str(tmp_path), samples_per_epoch=8, workers=workers)
    with pytest.raises(TooManyDroppedError, match=r"^500 samples in a row .*missing_image 500"):
        epoch_of(data)


@pytest.mark.parametrize(
    ("options", "place", "message"),
    [
        ({"samples_per_epoch": 3}, {}, "less than one batch of 4"),
        ({}, {}, "set samples_per_epoch, or resampled=false"),
        ({"resampled": False, "samples_per_epoch": 49}, {}, "is 49, the shards hold 48"),
        ({"samples_per_epoch": 0}, {}, "use 1 or more"),
        ({"samples_per_epoch": 8, "batch_size": 0}, {}, "batch_size is 0; it must be at least 1"),
        ({"samples_per_epoch": 8, "prompt": "a photo"}, {}, r"write \{} once"),
        ({"samples_per_epoch": 8, "max_phrases": -1}, {}, "max_phrases is -1"),
        ({"samples_per_epoch": 8}, {"start": 3}, "start 3 is outside the 2 batches"),
        (
            {"resampled": False, "workers": 3},
            {"world_size": 2},
            "4 shards cannot be split over 2 processes x 3 workers; lower workers",
        ),
    ],
)
def test_settings_that_make_no_sense(
    shards: str, source: Source, options: dict[str, Any], place: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        epoch_of(source(shards, **options), **place)


def test_prepare_makes_checks_and_reports(
    tmp_path: Path, make_shards: Make, source: Source
) -> None:
    def make() -> None:
        make_shards(tmp_path / "made", sizes=[6, 5])

    data = source(str(tmp_path / "made"), resampled=False, make=make)
    record = data.prepare()
    assert json.loads(json.dumps(record)) == record
    assert record.pop("fingerprint") == data.prepare()["fingerprint"]
    assert record == {
        "tagger": "textblob",
        "shards": 2,
        "samples_per_epoch": 11,
        "resampled": False,
    }
    with pytest.raises(FileNotFoundError, match="no shard matches"):
        source(str(tmp_path / "none*")).prepare()


def test_no_tagger_is_needed_without_phrases(
    shards: str, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(captions, "load_tagger", refuse)
    data = source(shards, samples_per_epoch=8, max_phrases=0, tagger="nltk")
    assert data.prepare()["tagger"] is None
    assert len(epoch_of(data)) == 2
