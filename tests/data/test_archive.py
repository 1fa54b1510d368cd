"""Tar archives as they come: whole, packed, cut, damaged, and made to harm."""

import contextlib
import io
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from gradeclip_ft.data import shards as archives
from gradeclip_ft.data.captions import sample_keys
from gradeclip_ft.data.shards import CutOffError, NoArchiveError, Skips, entries, read_shard

Files = Callable[..., dict[str, bytes]]
Write = Callable[..., Path]
BLOCK = tarfile.BLOCKSIZE


def names(content: bytes, causes: list[str] | None = None, *, read: bool = True) -> list[str]:
    noted = [] if causes is None else causes
    stream = io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]
    return [e.name for e in entries(stream, lambda cause, _: noted.append(cause), read=read)]


def archive(*files: tuple[str, bytes], style: int = tarfile.USTAR_FORMAT, mode: str = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode, format=style) as tar:  # type: ignore[call-overload]
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry.tobuf(tarfile.GNU_FORMAT)


LONG = "folder/" * 30 + "é" * 40 + ".txt"
THREE = (("a.txt", b"1"), ("b.txt", b"2" * 700), ("c.txt", b"3" * 512))


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("packing", ["", "gz", "bz2", "xz"])
def test_every_form_is_read_as_tarfile_does(style: int, packing: str) -> None:
    files = THREE if style == tarfile.USTAR_FORMAT else (*THREE, (LONG, b"4"))
    content = archive(*files, style=style, mode=f"w:{packing}")
    stream = io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]
    got = [(entry.name, entry.data) for entry in entries(stream, pytest.fail)]
    assert got == list(files)
    assert names(content, read=False) == [name for name, _ in files]


def test_links_folders_and_devices_are_no_files() -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            entry = tarfile.TarInfo("x")
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
        tar.addfile(tarfile.TarInfo("y.txt"))
    assert names(content.getvalue()) == ["y.txt"]


@pytest.mark.parametrize("read", [True, False])
def test_a_damaged_header_costs_its_file_alone(read: bool) -> None:
    """Python's tarfile ends there without a word, and the rest of the shard is lost."""
    content = bytearray(archive(*THREE))
    content[2 * BLOCK + 5] ^= 0xFF  # the name in b's header
    causes: list[str] = []
    assert names(bytes(content), causes, read=read) == ["a.txt", "c.txt"]
    assert causes == ["damaged_header"]


def test_a_hole_of_zeros_costs_what_was_in_it() -> None:
    """What an interrupted download of several parts leaves behind."""
    content = bytearray(archive(*THREE))
    content[2 * BLOCK : 5 * BLOCK] = bytes(3 * BLOCK)
    assert names(bytes(content)) == ["a.txt", "c.txt"]


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("cut", [4 * BLOCK + 100, 3 * BLOCK + 100, 2 * BLOCK + 100])
def test_a_cut_archive_says_so(cut: int, read: bool) -> None:
    """In the data, in the last block of the data, in the header."""
    content = archive(*THREE)[:cut]
    stream = io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]
    walk = entries(stream, pytest.fail, read=read)
    assert next(walk).name == "a.txt"
    with pytest.raises(CutOffError):
        list(walk)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"<html>" * 1000])
def test_other_files_are_no_archives(content: bytes) -> None:
    with pytest.raises(NoArchiveError):
        names(content)


@pytest.mark.parametrize("size", [2**40, 10**13])
@pytest.mark.parametrize("way", ["header", "pax", "longname"])
def test_claimed_terabytes_are_not_believed(size: int, way: str) -> None:
    """The claim costs its file; the samples behind it are read."""
    first, rest = archive(*THREE)[: 2 * BLOCK], archive(*THREE)[2 * BLOCK :]
    if way == "header":
        bomb = header("bomb.jpg", size)
    elif way == "pax":
        note = b"%d size=%d\n" % (len(b"%d" % size) + 9, size)
        described = tarfile.TarInfo("x")
        described.type, described.size = tarfile.XHDTYPE, len(note)
        bomb = described.tobuf() + note.ljust(BLOCK, b"\0") + header("bomb.jpg", 0)
    else:
        entry = tarfile.TarInfo("x")
        entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, size
        bomb = entry.tobuf(tarfile.GNU_FORMAT)
    causes: list[str] = []
    assert names(first + bomb + rest, causes) == ["a.txt", "b.txt", "c.txt"]
    assert causes == ["damaged_header" if way == "longname" else "oversized_file"]


def test_a_packed_bomb_is_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 MiB of zeros in 12 kB, where 10 are allowed, as a test with 300 would take long."""
    monkeypatch.setattr(archives, "MOST_BYTES", 10 * 2**20)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=6) as tar:
        entry = tarfile.TarInfo("bomb.jpg")
        entry.size = 12 * 2**20
        tar.addfile(entry, Zeros())
        tar.addfile(tarfile.TarInfo("good.txt"))
    causes: list[str] = []
    tracemalloc.start()
    assert names(content.getvalue(), causes) == ["good.txt"]
    assert tracemalloc.get_traced_memory()[1] < 6_000_000
    tracemalloc.stop()
    assert causes == ["oversized_file"]


class Zeros(io.RawIOBase):
    """As many as are asked for."""

    def read(self, size: int = -1) -> bytes:
        return bytes(size)


def test_counting_and_reading_agree_wherever_a_bit_is_wrong(
    tmp_path: Path, sample: Files, write_shard: Write
) -> None:
    """Without resampling, slices are cut by the counts: one sample off, and some come twice."""
    path = write_shard(tmp_path / "a.tar", [sample(number) for number in range(6)])
    content = path.read_bytes()
    order: Literal["little"] = "little"
    for number in range(0, len(content), 211):
        damaged = bytearray(content)
        damaged[number : number + 2] = number.to_bytes(3, order)[:2]
        path.write_bytes(damaged[: len(content) - number % 1000])
        keys = [raw["__key__"] for raw in read_shard(str(path), Skips(tell=lambda *_: None))]
        assert list(sample_keys(path)) == keys


def test_counting_and_reading_see_the_same_files_of_a_cut_packed_shard() -> None:
    """The cut may lie in the padding behind a complete file."""
    content = archive(*THREE, mode="w:gz")
    for cut in range(20, len(content)):
        found = []
        for read in (True, False):
            stream = io.BufferedReader(io.BytesIO(content[:cut]))  # type: ignore[arg-type]
            got: list[str] = []
            with contextlib.suppress(Exception):
                for entry in entries(stream, lambda *_: None, read=read):
                    got.append(entry.name)  # noqa: PERF401  # what came before the cut counts
            found.append(got)
        assert found[0] == found[1], cut
