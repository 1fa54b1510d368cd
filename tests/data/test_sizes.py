"""Counting samples from headers must agree with reading them."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gradeclip_ft.data.captions import fingerprint, sample_counts, sample_keys
from gradeclip_ft.data.shards import Skips, read_shard

Make = Callable[..., list[Path]]
Write = Callable[..., Path]
Files = Callable[..., dict[str, bytes]]


def read_keys(path: Path) -> list[str]:
    return [raw["__key__"] for raw in read_shard(str(path), Skips())]


def test_headers_and_reader_agree_on_odd_shards(
    tmp_path: Path, sample: Files, write_shard: Write
) -> None:
    rows = [
        {"__meta__": b"x", "no_suffix": b"y"},
        sample(0),
        {"dir/a.b.jpg": b"1", "dir/a.c.jpg": b"2"},
        sample(2),
        {"000000002.txt": b"again"},
        {"only.json": b"{}"},
    ]
    path = write_shard(tmp_path / "odd.tar", rows)
    assert list(sample_keys(path)) == read_keys(path) == ["000000000", "dir/a", "000000002", "only"]


@pytest.mark.parametrize("packed", [False, True])
def test_headers_and_reader_agree_wherever_a_shard_breaks_off(
    tmp_path: Path, make_shards: Make, packed: bool
) -> None:
    """Otherwise slices without resampling would leave samples out or read them twice."""
    (whole,) = make_shards(tmp_path / "whole", sizes=[12])
    content = gzip.compress(whole.read_bytes()) if packed else whole.read_bytes()
    for place in range(0, len(content), len(content) // 60):
        path = tmp_path / f"cut-{place}.tar"
        path.write_bytes(content[:place])
        assert list(sample_keys(path)) == read_keys(path), place


def test_a_changed_shard_is_counted_anew(tmp_path: Path, make_shards: Make) -> None:
    (path,) = make_shards(tmp_path, sizes=[5])
    before = fingerprint([str(path)])
    assert sample_counts([str(path)]) == [5]
    make_shards(tmp_path, sizes=[7])
    assert sample_counts([str(path)]) == [7]
    assert fingerprint([str(path)]) != before


def test_addresses_need_a_sizes_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"sizes\.json cannot be read .*`data count out=`"):
        sample_counts(["http://127.0.0.1:9/shards/a.tar"])


def test_addresses_take_counts_from_the_sizes_file(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text(json.dumps({"a.tar": {"samples": 5, "bytes": 1}}))
    command = f"pipe:cat {tmp_path}"
    assert sample_counts([f"{command}/a.tar"]) == [5]
    with pytest.raises(ValueError, match=r"does not list b\.tar"):
        sample_counts([f"{command}/b.tar"])


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
