"""Tar archives as they come: whole, packed, cut, damaged, and made to harm.

More damage is read in tests/tools: every fault of tools/faults.py, and mutations.
"""

import gzip
import io
import tarfile
import tracemalloc
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from gradeclip_ft.data import shards
from gradeclip_ft.data.shards import Skips, read_shard, sample_keys

Files = Callable[..., dict[str, bytes]]
Write = Callable[..., Path]
Read = Callable[..., tuple[dict[str, bytes], dict[str, int]]]
BLOCK = tarfile.BLOCKSIZE
LONG = "folder/" * 30 + "é" * 40 + ".txt"
THREE = {"a.txt": b"1", "b.txt": b"2" * 700, "c.txt": b"3" * 512}
STYLES = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Files of an archive by name, and what was counted; counting must find the same samples."""

    def run(content: bytes, wanted: Collection[str] | None = None) -> tuple[dict[str, bytes], dict]:
        path = tmp_path / "a.tar"
        path.write_bytes(content)
        skips = Skips(tell=lambda *_: None)
        samples = list(read_shard(str(path), skips, wanted=wanted))
        assert sample_keys(str(path)) == [sample["__key__"] for sample in samples]
        return {
            f"{sample['__key__']}.{suffix}": data
            for sample in samples
            for suffix, data in sample.items()
            if suffix[0] != "_"
        }, dict(skips.total)

    return run


def archive(
    files: dict[str, bytes], style: int = tarfile.USTAR_FORMAT, mode: str = "w", mtime: float = 0
) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode, format=style) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), mtime
            tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("packing", ["", "gz", "bz2", "xz"])
def test_every_form_is_read(read: Read, style: int, packing: str) -> None:
    files = THREE if style == tarfile.USTAR_FORMAT else {**THREE, LONG: b"4"}
    assert read(archive(files, style, f"w:{packing}")) == (files, {})


def test_archives_that_were_appended_to_each_other_are_read_to_the_end(read: Read) -> None:
    """Also in gzip, where Python's own stream mode stops silently after the first."""
    first, second = archive(THREE), archive({"d.txt": b"4"})
    assert read(first + second) == ({**THREE, "d.txt": b"4"}, {})
    assert read(gzip.compress(first) + gzip.compress(second)) == ({**THREE, "d.txt": b"4"}, {})


def test_links_folders_and_devices_are_not_files(read: Read) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            entry = tarfile.TarInfo("x.txt")
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
        tar.addfile(tarfile.TarInfo("y.txt"))
    assert read(content.getvalue()) == ({"y.txt": b""}, {})


@pytest.mark.parametrize("style", STYLES)
def test_a_damaged_header_costs_its_file_alone(read: Read, style: int) -> None:
    """Python's tarfile ends there silently, and the rest of the shard is lost."""
    content = bytearray(archive(THREE, style, mtime=0.5))  # in pax, each has two headers
    place = content.rindex(b"b.txt\0")
    content[place + 5] ^= 0xFF
    kept, counted = read(bytes(content))
    assert kept == {name: THREE[name] for name in ("a.txt", "c.txt")}
    assert counted == {"damaged_header": 1}


@pytest.mark.parametrize(
    ("cut", "kept", "cause"),
    [
        (4 * BLOCK + 100, ["a.txt"], "truncated_shard"),  # in the last block of the data
        (3 * BLOCK + 100, ["a.txt"], "truncated_shard"),
        (2 * BLOCK + 100, ["a.txt"], "damaged_header"),  # in the header
        (BLOCK, [], "unreadable_shard"),
    ],
)
def test_a_cut_archive_is_counted(read: Read, cut: int, kept: list[str], cause: str) -> None:
    files, counted = read(archive(THREE)[:cut])
    assert (list(files), counted) == (kept, {cause: 1})


@pytest.mark.parametrize("size", [2**31, 10**13])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, *shards.DESCRIPTIONS])
def test_claimed_terabytes_are_not_believed(read: Read, size: int, kind: bytes) -> None:
    """The claim costs its file; the samples after it are read."""
    content = archive(THREE)
    bomb = header("bomb.jpg", size, kind)
    files, counted = read(content[: 2 * BLOCK] + bomb + content[2 * BLOCK :])
    assert (files, counted) == (THREE, {"oversized_file": 1})


def test_a_claim_in_a_description_ends_the_shard_with_a_word(read: Read) -> None:
    """Tarfile would look for the end of the file for minutes."""
    note = b"20 size=10000000000\n"
    bomb = header("x", len(note), tarfile.XHDTYPE) + note.ljust(BLOCK, b"\0") + header("b.jpg", 0)
    content = archive(THREE)
    assert read(content[: 2 * BLOCK] + bomb + content[2 * BLOCK :])[1] == {"unreadable_shard": 1}


def test_bytes_of_a_sample_are_bounded_and_other_files_skipped_unread(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some kilobytes of gzip would fill the memory; tried with 3 MB where 64 are allowed."""
    monkeypatch.setattr(shards, "MOST_BYTES", 3 * 2**20)
    large = bytes(2 * 2**20)
    files = {"a.jpg": large, "a.txt": b"good", "a.png": large, "b.txt": b"next"}
    files |= {f"b.{number}": large for number in range(30)}
    content = archive(files, mode="w:gz")
    tracemalloc.start()
    got, counted = read(content, wanted=("jpg", "png", "txt"))
    assert tracemalloc.get_traced_memory()[1] < 14_000_000
    tracemalloc.stop()
    expected = {"a.jpg": large, "a.txt": b"good", "b.txt": b"next"}
    assert got == expected | {f"b.{number}": b"" for number in range(30)}
    assert counted == {"oversized_file": 1}


def test_a_gigabyte_without_a_header_ends_the_shard(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terabyte of zeros has a megabyte in bzip2, and would keep a worker busy for hours."""
    monkeypatch.setattr(shards, "MOST_GAP", 100)
    assert read(archive(THREE) + bytes(2**20))[1] == {"truncated_shard": 1}
