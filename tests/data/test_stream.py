"""Addresses of shards, reading that survives broken ones, and counting."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from gradeclip_ft.data import captions
from gradeclip_ft.data.captions import fingerprint, sample_counts
from gradeclip_ft.data.shards import (
    Part,
    Skips,
    TooManyDroppedError,
    expand_shards,
    read_shard,
    sample_keys,
    stable_hash,
)

Make = Callable[..., list[Path]]
Write = Callable[..., Path]
Files = Callable[..., dict[str, bytes]]


def keys_of(path: Path | str, skips: Skips | None = None) -> list[str]:
    return [raw["__key__"] for raw in read_shard(str(path), skips or Skips())]


@pytest.fixture
def five(tmp_path: Path, make_shards: Make) -> list[Path]:
    return make_shards(tmp_path, sizes=[2] * 5)


def test_every_way_to_name_shards_gives_the_same_list(tmp_path: Path, five: list[Path]) -> None:
    expected = [str(path) for path in five]
    assert expand_shards(f"{tmp_path}/part-{{0000..0004}}.tar") == expected
    assert expand_shards(f"{tmp_path}/part-*.tar") == expected
    assert expand_shards(str(tmp_path)) == expected
    assert expand_shards([f"{tmp_path}/part-000{{0,1}}.tar", *expected[2:]]) == expected
    assert expand_shards("::".join(expected)) == expected


def test_packed_shards_of_a_folder_are_found(tmp_path: Path) -> None:
    names = ["a.tar", "b.tar.gz", "c.tgz", "d.tar.bz2", "e.tar.xz"]
    for name in [*names, "sizes.json", "notes.txt"]:
        (tmp_path / name).touch()
    assert expand_shards(str(tmp_path)) == [str(tmp_path / name) for name in names]


def test_missing_local_shards_are_named(tmp_path: Path, five: list[Path]) -> None:
    five[3].unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 5 shards do not exist, first .*0003\.tar"):
        expand_shards(f"{tmp_path}/part-{{0000..0004}}.tar")
    with pytest.raises(FileNotFoundError, match=r"no shard matches .*none-"):
        expand_shards(f"{tmp_path}/none-*.tar")
    with pytest.raises(FileNotFoundError, match="no shard in"):
        expand_shards([])


def test_a_shard_named_twice_is_refused(tmp_path: Path, five: list[Path]) -> None:
    """Each sample would come twice per epoch."""
    with pytest.raises(ValueError, match="1 shards are listed twice"):
        expand_shards([str(tmp_path), str(five[0])])


def test_addresses_are_expanded_but_not_fetched() -> None:
    urls = expand_shards("https://host/cc3m-train-{0000..0575}.tar")
    assert (len(urls), urls[-1]) == (576, "https://host/cc3m-train-0575.tar")
    with pytest.raises(ValueError, match="allow_pipe=true"):
        expand_shards("pipe:touch /tmp/x; cat {0..3}.tar")
    assert expand_shards("pipe:cat {0..3}.tar", allow_pipe=True)[3] == "pipe:cat 3.tar"
    with pytest.raises(ValueError, match="cannot be read by htgs:"):
        expand_shards("htgs://bucket/{0..3}.tar")


def test_samples_come_in_order_with_all_their_files(five: list[Path]) -> None:
    skips = Skips()
    first, second = read_shard(str(five[1]), skips)
    assert [first["__key__"], second["__key__"]] == ["000000002", "000000003"]
    assert first["txt"] == b"a black horse near house 2"
    assert set(first) == {"__key__", "__url__", "jpg", "txt", "json"}
    assert skips.take() == {}


def test_files_of_a_sample_that_are_apart_are_named(
    tmp_path: Path, sample: Files, write_shard: Write
) -> None:
    """All pictures before all texts: every sample was without an image or without a caption."""
    files = sorted({**sample(0), **sample(1)}.items(), key=lambda file: file[0][-4:])
    path = write_shard(tmp_path / "a.tar", [dict([file]) for file in files])
    said: list[str] = []
    skips = Skips(tell=lambda cause, where, reason: said.append(f"{cause}: {reason}"))
    assert len(keys_of(path, skips)) == 6
    assert said[0].startswith("scattered_sample: 000000000 comes again; files of one sample must")


def test_the_log_names_the_first_and_then_every_1000th(caplog: pytest.LogCaptureFixture) -> None:
    skips = Skips()
    with caplog.at_level(logging.WARNING):
        for number in range(2500):
            skips.add("broken_image", f"key{number}", "why")
        skips.add("missing_text", "other")
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == [
        "key0",
        "key1000",
        "key2000",
        "other",
    ]
    assert skips.take() == {"broken_image": 2500, "missing_text": 1}
    assert skips.take() == {}


def test_foreign_names_cannot_forge_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A line break in a name from a shard would look like a message of ours."""
    with caplog.at_level(logging.WARNING):
        Skips().add("broken_image", "a\nERROR: all is lost\x1b[2J", "\udcff" + "x" * 5000)
    (record,) = caplog.records
    assert "\\nERROR" in record.message
    assert record.message.isprintable()
    assert len(record.message) < 500


@pytest.mark.parametrize(("part", "least"), [("shard", 20), ("sample", 1000)])
def test_too_large_a_share_of_failures_ends_the_reading(part: Part, least: int) -> None:
    """A fifth is allowed: one more than that is not, but only after enough was seen."""
    skips = Skips(most=0.2, tell=lambda *_: None)
    for _ in range(least - 1):
        skips.seen[part] += 1
        skips.drop(part, "cause", "where")
    skips = Skips(most=0.2, tell=lambda *_: None)
    skips.seen[part] = least
    for _ in range(least // 5):
        skips.drop(part, "cause", "where")
    with pytest.raises(TooManyDroppedError, match=rf"{least // 5 + 1} of {least} {part}s"):
        skips.drop(part, "cause", "where")


def test_hashes_do_not_depend_on_the_process() -> None:
    """Python's own hash does; the value is `b2sum -l 64` prints, shifted by one bit."""
    assert stable_hash("black car") == int("12100969a7e878ea", 16) >> 1


def test_addresses_are_read_like_files(five: list[Path], web: str) -> None:
    skips = Skips()
    assert keys_of(f"{web}/part-0002.tar", skips) == keys_of(five[2])
    reader = read_shard(f"{web}/part-0003.tar", skips)
    next(reader)
    reader.close()  # type: ignore[attr-defined]  # a reader that stops early is not an error
    assert skips.take() == {}
    assert keys_of(f"{web}/none.tar", skips) == []
    assert skips.take() == {"unreadable_shard": 1}


def test_headers_and_reader_agree_on_odd_shards(
    tmp_path: Path, sample: Files, write_shard: Write
) -> None:
    rows = [
        {"__meta__": b"x", "no_suffix": b"y"},
        sample(0),
        {"dir/a.b.jpg": b"1", "dir/a.c.jpg": b"2"},
        sample(2),
        {"000000002.txt": b"again"},
        {"./only.json": b"{}"},
    ]
    path = write_shard(tmp_path / "odd.tar", rows)
    expected = ["000000000", "dir/a", "000000002", "./only"]
    assert sample_keys(str(path)) == keys_of(path) == expected


def test_a_changed_shard_is_counted_anew(tmp_path: Path, make_shards: Make) -> None:
    (path,) = make_shards(tmp_path, sizes=[5])
    before = fingerprint([str(path)])
    assert sample_counts([str(path)]) == [5]
    make_shards(tmp_path, sizes=[7])
    assert sample_counts([str(path)]) == [7]
    assert fingerprint([str(path)]) != before


def test_addresses_take_counts_from_the_sizes_file(
    tmp_path: Path, five: list[Path], web: str
) -> None:
    url = f"{web}/{five[0].name}?Signature=a/b"
    with pytest.raises(ValueError, match=r"sizes\.json cannot be read .*`data count out=`"):
        sample_counts([url])
    captions._read_sizes.cache_clear()
    (tmp_path / "sizes.json").write_text(json.dumps({five[0].name: {"samples": 5, "bytes": 1}}))
    assert sample_counts([url]) == [5]
    with pytest.raises(ValueError, match=r"does not list b\.tar"):
        sample_counts([f"{web}/b.tar"])


def test_a_sizes_file_counts_for_local_shards_while_the_bytes_agree(
    tmp_path: Path, make_shards: Make
) -> None:
    first, second = make_shards(tmp_path, sizes=[5, 6])
    sizes = {
        first.name: {"samples": 77, "bytes": first.stat().st_size},
        second.name: {"samples": 88, "bytes": second.stat().st_size - 1},
    }
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    assert sample_counts([str(first), str(second)]) == [77, 6]
