"""Shards to raw samples: their addresses, and reading that survives broken ones and counts them.

Every shard is read on its own, so a broken one costs what is broken in it and nothing else.
webdataset groups files to samples.
"""

from __future__ import annotations

import base64
import bz2
import glob
import gzip
import hashlib
import logging
import lzma
import re
import select
import subprocess
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPException, HTTPResponse
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any, Literal, Protocol, runtime_checkable
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import url2pathname

from huggingface_hub import get_token, hf_hub_url
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

from gradeclip_ft.results.masking import masked

AGAIN = (408, 425, 429, 500, 502, 503, 504)
# Programs that print a file; the address is one argument, and no shell sees it.
CURL = ("curl", "--fail", "--silent", "--show-error", "--connect-timeout", "30")
PROGRAMS: dict[str, Callable[[str], list[str]]] = {
    "s3": lambda url: ["aws", "s3", "cp", url, "-"],
    "gs": lambda url: ["gsutil", "cat", url],
    "ais": lambda url: ["ais", "get", url, "-"],
    "sftp": lambda url: [*CURL, url],
    "ftps": lambda url: [*CURL, url],
    "scp": lambda url: [*CURL, url],
    "pipe": lambda url: ["/bin/sh", "-c", url.removeprefix("pipe:")],
}
SCHEMES = ("file", "http", "https", "hf", *sorted(set(PROGRAMS) - {"pipe"}))
HUB = re.compile(r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")


class GoneError(OSError):
    """An answer that another attempt will not change: not there, not allowed, no such program."""


@runtime_checkable
class RemotePart(Protocol):
    """A stream that begins somewhere in a file."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes, as soon as there are some; none at the end."""
        ...

    def close(self) -> None:
        """End it, also in the middle."""
        ...


Connect = Callable[[int, float], tuple[RemotePart, int]]
"""First byte wanted and seconds to wait, to a stream and the byte it really begins with."""


class Web:
    """A file behind an address, from any byte on."""

    def __init__(self, url: str) -> None:
        self._url, self._headers = _address(url)
        self._version: str | None = None

    def __call__(self, start: int, seconds: float) -> tuple[RemotePart, int]:
        """Connects; servers without ranges begin anew.

        Raises:
            OSError: No connection, or an answer of failure.
        """
        request = urllib.request.Request(self._url)
        for name, value in self._headers.items():
            request.add_unredirected_header(name, value)  # for this host alone
        if start:
            request.add_header("Range", f"bytes={start}-")
        try:
            answer: HTTPResponse = _opener().open(request, timeout=seconds)
        except urllib.error.HTTPError as error:
            error.close()
            kind = OSError if error.code in AGAIN else GoneError
            raise kind(f"the server says {error.code} {error.reason}") from None
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if self._version not in (None, version):
            answer.close()
            raise GoneError("it has changed on the server since its beginning was read")
        self._version = version
        return _Body(answer), start if answer.status == 206 else 0


class _Body:
    """A response; cut off, it is an error, where HTTPResponse ends in silence."""

    def __init__(self, answer: HTTPResponse) -> None:
        self._answer = answer
        length = answer.headers.get("Content-Length")
        self._left = int(length) if length and length.isdigit() else None

    def read(self, size: int) -> bytes:
        data = self._answer.read1(size)
        if self._left is not None:
            self._left -= len(data)
            if not data and self._left > 0:
                raise OSError(f"the connection ended {self._left:,} bytes too early")
        return data

    def close(self) -> None:
        self._answer.close()


class Program:
    """What a program prints, always from its beginning."""

    def __init__(self, command: list[str]) -> None:
        self._command = command

    def __call__(self, start: int, seconds: float) -> tuple[RemotePart, int]:
        """Starts it.

        Raises:
            GoneError: There is no such program.
        """
        return _Output(self._command, seconds), 0


class _Output:
    """The output of one run of a program."""

    def __init__(self, command: list[str], seconds: float) -> None:
        self._name, self._seconds = command[0], seconds
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the program
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
            )
        except OSError as error:
            self._errors.close()
            raise GoneError(f"cannot start {command[0]}: {error.strerror}") from None

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], self._seconds)[0]:
            raise TimeoutError(f"{self._name} printed nothing for {self._seconds:g} s")
        data: bytes = self._process.stdout.read(size)
        if not data and (code := self._process.wait(self._seconds)):
            raise OSError(f"{self._name} ended with {code}: {self._complaint()}")
        return data

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _complaint(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read(4096).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"


@cache
def _opener() -> urllib.request.OpenerDirector:
    """For http and https alone, so that no answer leads to a file of this machine."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _address(url: str) -> tuple[str, dict[str, str]]:
    """Address without credentials, and the headers that carry them."""
    if url.startswith("hf://"):
        token = get_token()
        return _hub_address(url), {"Authorization": f"Bearer {token}"} if token else {}
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    path = quote(parts.path, safe="/%:@!$&'()*+,;=~")
    plain = urlunsplit((parts.scheme, host, path or "/", parts.query, ""))
    if not parts.username:
        return plain, {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return plain, {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _hub_address(url: str) -> str:
    """Of hf://datasets/OWNER/NAME[@REVISION]/FILE.

    >>> _hub_address("hf://datasets/pixparse/cc3m-wds/cc3m-train-0000.tar")
    'https://huggingface.co/datasets/pixparse/cc3m-wds/resolve/main/cc3m-train-0000.tar'
    """
    found = HUB.fullmatch(url)
    if found is None:
        raise GoneError(f"{url} is no hf://datasets/OWNER/NAME/FILE")
    return hf_hub_url(
        found["repository"], found["file"], repo_type="dataset", revision=found["revision"]
    )


BUFFER = 2**20
LEAST_SPEED = 1000  # bytes a second


@dataclass(frozen=True)
class Patience:
    """How long a remote shard is waited for.

    Attributes:
        seconds: Without a byte, before a connection counts as dead.
        attempts: To open or go on, in a row without a new byte.
        pause: Seconds before the second attempt; doubled each time.
    """

    seconds: float = 60.0
    attempts: int = 5
    pause: float = 1.0


def is_local(url: str) -> bool:
    """Whether a shard is a file of this machine."""
    return urlsplit(url).scheme in ("", "file")


def local_path(url: str) -> Path:
    """The file behind a local address."""
    return Path(url2pathname(urlsplit(url).path) if url.startswith("file:") else url)


@cache
def shard_name(url: str) -> str:
    """Its last part, without credentials and query: for messages and keys.

    >>> shard_name("https://host/cc3m/cc3m-train-0004.tar?Signature=abc")
    'cc3m-train-0004.tar'
    """
    name = masked(url).rsplit("/", 1)[-1]
    return name if is_local(url) else name.partition("?")[0]


def open_shard(url: str, patience: Patience | None = None) -> BufferedReader:
    """Bytes of a shard.

    Raises:
        OSError: It is not there, or does not answer; the same while reading.
    """
    if is_local(url):
        return BufferedReader(local_path(url).open("rb", buffering=0), BUFFER)
    scheme = urlsplit(url).scheme
    connect = Program(PROGRAMS[scheme](url)) if scheme in PROGRAMS else Web(url)
    return BufferedReader(_Resumed(connect, patience or Patience()), BUFFER)


class _Resumed(RawIOBase):
    """One stream out of as many connections as it takes."""

    def __init__(self, connect: Connect, patience: Patience) -> None:
        super().__init__()
        self._connect = connect
        self._patience = patience
        self._part: RemotePart | None = None
        self._position = 0
        self._failures = 0
        self._trusted = BUFFER  # at this byte failures are forgiven
        self._waited, self._begun = 0.0, 0  # of the present window

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes; 0 at the end.

        Raises:
            OSError: After the last attempt.
        """
        while True:
            begun = time.monotonic()
            try:
                if self._part is None:
                    self._part = self._reopened()
                data = self._part.read(len(buffer))
                self._require_speed(time.monotonic() - begun, len(data))
            except (OSError, HTTPException) as error:
                self._wait_or_give_up(error)
                continue
            buffer[: len(data)] = data
            self._position += len(data)
            if self._position >= self._trusted:
                self._failures, self._trusted = 0, self._position + BUFFER
            return len(data)

    def close(self) -> None:
        """End the connection."""
        self._drop()
        super().close()

    def _reopened(self) -> RemotePart:
        """A connection that stands where the last one stopped."""
        part, place = self._connect(self._position, self._patience.seconds)
        try:
            while place < self._position:
                data = part.read(min(BUFFER, self._position - place))
                if not data:
                    raise GoneError("it is shorter than before")
                place += len(data)
        except BaseException:
            part.close()
            raise
        return part

    def _require_speed(self, seconds: float, size: int) -> None:
        """A server that lets single bytes drip is as good as silent."""
        self._waited += seconds
        self._begun += size
        if self._waited > self._patience.seconds:
            slow = size > 0 and self._begun < LEAST_SPEED * self._waited
            self._waited, self._begun = 0.0, 0
            if slow:
                raise TimeoutError(f"less than {LEAST_SPEED:,} bytes a second")

    def _wait_or_give_up(self, error: Exception) -> None:
        self._drop()
        self._failures += 1
        if isinstance(error, GoneError):
            raise error
        if self._failures >= self._patience.attempts:
            self._failures = 0
            reason = masked(str(error) or type(error).__name__)
            raise OSError(f"{reason}; {self._patience.attempts} attempts") from error
        time.sleep(self._patience.pause * 2 ** (self._failures - 1))

    def _drop(self) -> None:
        part, self._part = self._part, None
        if part is not None:
            part.close()


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


META = re.compile(r"__[^/]*__($|/)")  # webdataset's notes on a shard
RawSample = dict[str, Any]
"""One sample as webdataset groups it: `__key__`, `__url__`, and bytes by file suffix."""

LOG_EVERY = 1000
LONGEST_LOG = 300
LEAST = {"shard": 20, "sample": 1000}
"""So many must have been seen before the share of dropped ones can end a run."""
Part = Literal["shard", "sample"]
logger = logging.getLogger(__name__)


class BadSampleError(Exception):
    """A sample that cannot be used; its first argument is the cause."""


class TooManyDroppedError(RuntimeError):
    """More of the data cannot be used than the settings allow."""


@dataclass
class Skips:
    """Counts what is dropped, by cause; logs the first of each cause and then every 1,000th.

    Attributes:
        most: Share of shards, and share of samples, that may be dropped.
        recent: Counts since they were last taken.
        total: All counts.
        tell: Called with cause, place and reason of each, instead of logging.
        seen: Shards and samples that were tried.
        dropped: Those of them that cannot be used.
    """

    most: float = 1.0
    recent: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)
    tell: Callable[[str, str, str], None] | None = None
    seen: Counter[Part] = field(default_factory=Counter)
    dropped: Counter[Part] = field(default_factory=Counter)

    def add(self, cause: str, where: str, error: object = "") -> None:
        """Note one thing that is not as it should be."""
        self.recent[cause] += 1
        self.total[cause] += 1
        if self.tell is not None:
            self.tell(cause, printable(where), printable(str(error)))
        elif self.total[cause] % LOG_EVERY == 1:
            number, reason = self.total[cause], printable(str(error))
            logger.warning(
                "skipped %s (%s, number %d): %s", printable(where), cause, number, reason
            )

    def drop(self, what: Part, cause: str, where: str, error: object = "") -> None:
        """Note a shard or sample that is lost.

        Raises:
            TooManyDroppedError: The share of lost ones is above `most`.
        """
        self.add(cause, where, error)
        self.dropped[what] += 1
        lost, seen = self.dropped[what], self.seen[what]
        if seen >= LEAST[what] and lost > self.most * seen:
            raise TooManyDroppedError(
                f"{lost} of {seen} {what}s cannot be used ({self.causes()}), more than "
                f"max_dropped={self.most:g} allows; see which with `data verify`, or raise it"
            )

    def causes(self) -> str:
        """All counts, in words."""
        return ", ".join(f"{cause} {number}" for cause, number in self.total.items())

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        taken = dict(self.recent)
        self.recent.clear()
        return taken


def printable(text: str) -> str:
    """A text from foreign data as one line without secrets or control characters."""
    line = escaped(masked(text[: 2 * LONGEST_LOG]))
    return line if len(line) <= LONGEST_LOG else f"{line[: LONGEST_LOG - 3]}..."


def escaped(text: str) -> str:
    r"""Control characters and broken ones as escapes.

    >>> escaped("a\nb")
    'a\\nb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def expand_shards(shards: str | Sequence[str], *, allow_pipe: bool = False) -> list[str]:
    """Paths and addresses of shards.

    Args:
        shards: One entry or several: a file, a folder of .tar files, a glob, an address, each with
            brace lists as in `cc3m-train-{0000..0575}.tar`; `::` separates several in one entry.
        allow_pipe: Accept `pipe:COMMAND`, which runs that command in a shell.

    Raises:
        FileNotFoundError: Nothing matches, or local files are missing.
        ValueError: An address that cannot be read, or a shard listed twice.
    """
    entries = [shards] if isinstance(shards, str) else list(shards)
    found = [
        path for entry in entries for url in expand_urls(entry) for path in _expand(url, allow_pipe)
    ]
    if not found:
        raise FileNotFoundError(
            f"no shard in {masked(repr(shards))}; name files, a folder, a glob or addresses"
        )
    twice = [url for url, count in Counter(found).items() if count > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} shards are listed twice, first {masked(twice[0])}; list each once"
        )
    missing = [url for url in found if is_local(url) and not local_path(url).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(found)} shards do not exist, first {missing[0]}; fetch them "
            "or correct shards="
        )
    return found


def read_shard(url: str, skips: Skips, patience: Patience | None = None) -> Iterator[RawSample]:
    """Samples of one shard in their order; what cannot be read is counted.

    A shard that breaks off loses its tail, one that cannot be opened or holds nothing loses all.

    Raises:
        TooManyDroppedError: So many shards are broken that `skips` stops the run.
    """
    skips.seen["shard"] += 1
    found = 0
    try:
        with open_shard(url, patience) as stream:
            for sample in group_by_keys(_files(url, stream, skips), handler=_drop(skips, url)):
                found += 1
                yield sample
    except Exception as error:  # readers of broken data raise anything, from OSError to KeyError
        cut = found > 0 or isinstance(error, CutOffError | EOFError)
        skips.drop("shard", "truncated_shard" if cut else "unreadable_shard", url, _reason(error))
    else:
        if not found:
            skips.drop("shard", "empty_shard", url, "it holds no sample")


def stable_hash(text: str) -> int:
    """63 bits that are the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def _expand(url: str, allow_pipe: bool) -> list[str]:
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise ValueError(
                f"{masked(url)!r} would run a shell command; set allow_pipe=true if you mean it"
            )
        return [url]
    if not is_local(url):
        if (scheme := urlsplit(url).scheme) not in SCHEMES:
            raise ValueError(
                f"{masked(url)}: shards cannot be read by {scheme}:, only by {', '.join(SCHEMES)}; "
                "copy them here, or use pipe:COMMAND with allow_pipe=true"
            )
        return [url]
    path = local_path(url)
    if path.is_dir():
        return _matches(str(path / "*.tar"))
    return [url] if path.exists() or not re.search(r"[*?\[]", str(path)) else _matches(str(path))


def _matches(pattern: str) -> list[str]:
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise FileNotFoundError(
            f"no shard matches {pattern}; make or fetch them, or correct shards="
        )
    return found


def _reason(error: Exception) -> str:
    """The message; its class where there is none or only a number."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, OSError | CutOffError | NoArchiveError):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"


def _files(url: str, stream: BufferedReader, skips: Skips) -> Iterator[dict[str, Any]]:
    """Files as webdataset groups them; the last, empty one completes the last sample."""
    for entry in entries(stream, lambda cause, reason: skips.add(cause, url, reason)):
        if not META.match(entry.name):
            yield {"fname": entry.name, "data": entry.data, "__url__": url}
    yield {}


def _drop(skips: Skips, url: str) -> Callable[[Exception], bool]:
    """Webdataset's handler: go on behind a second file of the same name, and only there."""

    def handler(error: Exception) -> bool:
        if isinstance(error, ValueError) and "duplicate file name" in str(error.args[0]):
            skips.add("duplicate_name", url, str(error.args[0]).split(" dict_keys")[0])
            return True
        raise error

    return handler
