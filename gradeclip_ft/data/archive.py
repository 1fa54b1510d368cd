"""Files of a tar archive as it streams by, also of a damaged one, at bounded memory.

tarfile ends in silence at the first damaged header, and reads whatever size a header claims. Here a
damaged header costs the file behind it: blocks are skipped up to the next sound header. Nothing is
extracted, and no name from an archive becomes a path.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import IO, Any

BLOCK = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK)
CHUNK = 4 * 2**20
MOST_BYTES = 256 * 2**20  # of a file; the largest photos have some 50 MB
MOST_NOTE = 2**20  # of a header that only describes the next file
MOST_GAP = 2 * 2**20  # blocks without a sound header: 1 GiB
DESCRIPTIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
WITHOUT_DATA = set(tarfile.SUPPORTED_TYPES) - {
    *REGULAR,
    *DESCRIPTIONS,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.GNUTYPE_SPARSE,
}
PACKED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}

Note = Callable[[str, str], None]
"""Told cause and description of damage that does not end the archive."""


class CutOffError(Exception):
    """The archive ends inside a file or a header."""


class NoArchiveError(Exception):
    """These bytes are no tar archive."""


@dataclass(frozen=True)
class Entry:
    """A regular file: its name, for grouping and messages alone, and its content if it was read."""

    name: str
    data: bytes


@dataclass
class _Description:
    """What precedes a header and overrules it."""

    name: str | None = None
    size: int | None = None


def entries(stream: BufferedReader, note: Note, *, read: bool = True) -> Iterator[Entry]:
    """Regular files in order, each complete; gzip, bzip2 and xz are recognised.

    Args:
        stream: The archive.
        note: Told of "damaged_header", and of "oversized_file": more than 256 MiB.
        read: Whether to read contents, or only to go from header to header.

    Raises:
        CutOffError: The archive breaks off.
        NoArchiveError: It is something else, or has no byte.
        OSError: Of the stream; of compressed ones also EOFError, zlib.error, lzma.LZMAError.
    """
    source = _Source(stream)
    described = _Description()
    for header in _headers(source, note):
        size = header.size if described.size is None else described.size
        if header.type in DESCRIPTIONS:
            described = _described(header, source.take(_padded(size))[:size], described)
            continue
        name, described = described.name or header.name, _Description()
        if not 0 <= size <= MOST_BYTES:
            note("oversized_file", f"{name} claims {size:,} bytes")
            source.lost = True  # that many bytes may follow, or none
        elif header.type in REGULAR:
            if not read:
                source.skip(size, needed=size)
            yield Entry(name, source.take(size) if read else b"")
            source.skip(_padded(size) - size, needed=0)
        elif header.type not in WITHOUT_DATA:
            source.skip(_padded(size), needed=size)


def _headers(source: _Source, note: Note) -> Iterator[tarfile.TarInfo]:
    """Sound headers; whoever gets one takes or skips the data behind it, or calls it lost.

    Blocks of zeros are the end of an archive, or what a download left out: either way reading goes
    on behind them.
    """
    gap, found, other = 0, False, source.is_empty
    while block := source.block():
        if (header := _header(block)) is not None:
            gap, found, source.lost = 0, True, False
            yield header
            continue
        gap, other = gap + 1, other or block != ZEROS
        if found and len(block) < BLOCK and any(block):
            raise CutOffError("the archive ends inside a header")
        if found and not source.lost and block != ZEROS:
            source.lost = True
            note("damaged_header", "no header where one should be; what it names is lost")
        if gap > MOST_GAP:
            raise CutOffError(f"no header in {MOST_GAP * BLOCK:,} bytes")
    if not found and other:
        raise NoArchiveError("empty file" if source.is_empty else "no tar archive")


def _header(block: bytes) -> tarfile.TarInfo | None:
    """The header, unless the block is none, or describes the next one at unlikely length."""
    if block == ZEROS:
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None
    if header.size < 0 or (header.type in DESCRIPTIONS and header.size > MOST_NOTE):
        return None
    return header


def _described(header: tarfile.TarInfo, data: bytes, before: _Description) -> _Description:
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return _Description(data.split(b"\0")[0].decode("utf-8", "surrogateescape"), before.size)
    name, size = before.name, before.size
    for line in re.finditer(rb"(?:^|(?<=\n))\d+ (path|size)=([^\n]*)\n", data):
        if line[1] == b"path":
            name = line[2].decode("utf-8", "surrogateescape")
        elif line[2].isdigit() and len(line[2]) < 20:
            size = int(line[2])
    return _Description(name, size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class _Source:
    """Exact reads from a stream that may be compressed.

    Attributes:
        is_empty: Whether nothing came.
        lost: Whether it is unknown where the next header stands.
    """

    def __init__(self, stream: BufferedReader) -> None:
        self.lost = False
        first = stream.peek(BLOCK)
        self.is_empty = not first
        opener = next((PACKED[magic] for magic in PACKED if first.startswith(magic)), None)
        self._stream: IO[bytes] = stream if opener is None else opener(stream)
        self._seeks = opener is None and stream.seekable()

    def block(self) -> bytes:
        """The next block, the last one perhaps shorter; empty at the end."""
        return self._read(BLOCK)

    def take(self, size: int) -> bytes:
        """The next bytes, all of them."""
        data = self._read(size)
        if len(data) < size:
            raise CutOffError(f"the archive ends {size - len(data):,} bytes too early")
        return data

    def skip(self, size: int, *, needed: int) -> None:
        """Go on; the first `needed` of these bytes must be there."""
        if self._seeks and needed:  # the last byte tells whether all are there
            self._stream.seek(needed - 1, 1)
            self.take(1)
            self._stream.seek(size - needed, 1)
            return
        while size > 0:
            got = len(self._read(min(size, CHUNK)))
            if not got and needed > 0:
                raise CutOffError(f"the archive ends {needed:,} bytes too early")
            if not got:
                return
            size, needed = size - got, needed - got

    def _read(self, size: int) -> bytes:
        """As many bytes as there are, at most `size`, whatever size is claimed."""
        data = self._stream.read(min(size, CHUNK))
        if len(data) == size or not data:
            return data
        parts = [data]
        missing = size - len(data)
        while missing and (data := self._stream.read(min(missing, CHUNK))):
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)
