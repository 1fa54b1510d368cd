"""Shards to raw samples: their addresses, and reading that survives broken ones and counts them.

Every shard is read on its own, so a broken one costs what is broken in it and nothing else. A
remote one is read in one stream that continues after a broken connection with the next byte.
"""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import hashlib
import http.client
import logging
import lzma
import os
import re
import select
import signal
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any, ClassVar, Literal
from urllib.parse import unquote, urlsplit

import fsspec
from aiohttp import ClientResponse, ClientTimeout, NonHttpUrlClientError
from fsspec.asyn import sync
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from gradeclip_ft.results.masking import masked

RawSample = dict[str, Any]
"""One sample: `__key__`, `__url__`, and bytes by file suffix, lower-cased."""

SCHEMES = ("file", "http", "https", "hf", "s3", "gs")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PACKED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
META = re.compile(r"__[^/]*__($|/)")  # webdataset's notes on a shard
BUFFER = 2**18
MOST_BYTES = 64 * 2**20  # of a sample's files together; the largest photos have some 50 MB
MOST_CLAIMED = 2**30  # of a file: a larger size is a damaged number
MOST_GAP = 2**21  # blocks without a header: 1 GiB
MOST_NOTE = 2**20  # of a header that only describes the next file
DESCRIPTIONS = (b"L", b"K", b"x", b"g", b"X")  # long names and links, pax headers of all kinds
NEIGHBOURS = "files of one sample must be neighbours, as `tar --sort=name` writes them"
LOG_EVERY = 1000
LONGEST_LOG = 300
Part = Literal["shard", "sample"]
LEAST: dict[Part, int] = {"shard": 20, "sample": 1000}
"""How many must have been seen before the share of dropped ones can end a run."""
logger = logging.getLogger(__name__)


class BadSampleError(Exception):
    """A sample that cannot be used; its first argument is the cause."""


class TooManyDroppedError(RuntimeError):
    """More of the data cannot be used than the settings allow."""


class PermanentError(OSError):
    """Another attempt will not help: not there, not allowed, not installed."""


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
        number, place, reason = self.total[cause], printable(where), printable(str(error))
        if self.tell is not None:
            self.tell(cause, place, reason)
        elif number % LOG_EVERY == 1:
            logger.warning("skipped %s (%s, number %d): %s", place, cause, number, reason)

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
    r"""A text from foreign data as one line without secrets or control characters.

    >>> printable("a\nb")
    'a\\nb'
    """
    line = masked(text[: 2 * LONGEST_LOG])
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= LONGEST_LOG else f"{line[: LONGEST_LOG - 3]}..."


def stable_hash(text: str) -> int:
    """63 bits that are the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


class AllowedCommand(str):
    """A `pipe:COMMAND` that the user allowed; any other one is refused where it is opened."""


def expand_shards(shards: str | Sequence[str], *, allow_pipe: bool = False) -> list[str]:
    """Paths and addresses of shards.

    Args:
        shards: One entry or several: a file, a folder of archives, a glob, an address, each with
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


def _expand(url: str, allow_pipe: bool) -> list[str]:
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise ValueError(_refusal(url))
        return [AllowedCommand(url)]
    if not is_local(url):
        if (scheme := urlsplit(url).scheme) not in SCHEMES:
            raise ValueError(
                f"{masked(url)}: shards cannot be read by {scheme}:, only by {', '.join(SCHEMES)}; "
                "copy them here, or use pipe:COMMAND with allow_pipe=true"
            )
        return [url]
    path = local_path(url)
    if path.is_dir():
        pattern = path / "*.tar"
        found = [str(file) for file in path.iterdir() if file.name.endswith(ARCHIVES)]
    elif path.exists() or not re.search(r"[*?\[]", str(path)):
        return [url]
    else:
        pattern = path
        found = glob.glob(str(path), recursive=True)
    if not found:
        raise FileNotFoundError(
            f"no shard matches {pattern}; make or fetch them, or correct shards="
        )
    return sorted(found)


def _refusal(url: str) -> str:
    return f"{masked(url)!r} would run a shell command; set allow_pipe=true if you mean it"


def is_local(url: str) -> bool:
    """Whether a shard is a file of this machine."""
    return urlsplit(url).scheme in ("", "file")


def local_path(url: str) -> Path:
    """The file of a local address."""
    return Path(unquote(urlsplit(url).path) if url.startswith("file:") else url)


@cache
def shard_name(url: str) -> str:
    """Its last part, without credentials and query: for messages, keys and copies.

    >>> shard_name("https://host/cc3m/cc3m-train-0004.tar?Signature=abc/def")
    'cc3m-train-0004.tar'
    """
    plain = masked(url if is_local(url) else url.partition("?")[0])
    return plain.rsplit("/", 1)[-1]


def read_shard(
    url: str,
    skips: Skips,
    patience: Patience | None = None,
    *,
    wanted: Collection[str] | None = None,
) -> Iterator[RawSample]:
    """Samples of one shard in their order; what cannot be read is counted.

    A shard that breaks off loses its tail, one that cannot be opened or holds nothing loses all.

    Args:
        url: The shard.
        skips: Counts.
        patience: With a remote shard.
        wanted: Suffixes of the files to read; others are passed over and come empty. None: all.

    Raises:
        TooManyDroppedError: Too large a share of the shards is broken.
    """
    skips.seen["shard"] += 1
    found = 0
    try:
        with open_shard(url, patience) as stream:
            for sample in _samples(url, stream, skips, wanted):
                found += 1
                yield sample
    except Exception as error:  # readers of broken data raise anything, from OSError to KeyError
        cause = "truncated_shard" if found else "unreadable_shard"
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        skips.drop("shard", cause, url, reason)
    else:
        if not found:
            skips.drop("shard", "empty_shard", url, "it holds no sample")


def sample_keys(url: str) -> list[str]:
    """Keys of a shard's samples, by headers alone where the file allows; as the reader has them."""
    silent = Skips(tell=lambda *_: None)
    return [sample["__key__"] for sample in read_shard(url, silent, wanted=())]


def _samples(
    url: str, stream: BufferedReader, skips: Skips, wanted: Collection[str] | None
) -> Iterator[RawSample]:
    """Groups files by webdataset's rule: neighbours with the same name up to the first dot."""
    unpack = next((PACKED[magic] for magic in PACKED if stream.peek(8).startswith(magic)), None)
    file: IO[bytes] = stream if unpack is None else unpack(stream)
    headers: Any = type("Header", (_Header,), {"url": url, "skips": skips})
    mode: Any = "r:" if file.seekable() else "r|"
    sample: RawSample = {}
    seen: set[str] = set()
    archive: Any
    with tarfile.open(fileobj=file, mode=mode, ignore_zeros=True, tarinfo=headers) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # else it keeps the headers of the whole shard
            headers.tell()
            if not 0 <= member.size <= MOST_CLAIMED:  # by a pax header; tarfile would believe it
                raise tarfile.ReadError(f"{member.name} claims {member.size:,} bytes")
            key, suffix = base_plus_ext(member.name)
            if not member.isreg() or key is None or META.match(member.name):
                continue
            suffix = suffix.lower()
            is_wanted = wanted is None or suffix in wanted
            if member.size > MOST_BYTES:
                if is_wanted:
                    skips.add("oversized_file", url, f"{member.name} has {member.size:,} bytes")
                continue
            if sample.get("__key__") != key:
                if sample:
                    yield sample
                if key in seen:
                    skips.add("scattered_sample", url, f"{key} comes again; {NEIGHBOURS}")
                seen.add(key)
                sample, left = {"__key__": key, "__url__": url}, MOST_BYTES
            content = archive.extractfile(member)
            if suffix in sample:
                skips.add("duplicate_name", url, f"{member.name}: a second .{suffix} of its sample")
            elif not is_wanted:
                content.seek(max(member.size - 1, 0))  # its last byte tells whether it is complete
                sample[suffix] = content.read()[:0]
            elif member.size > left:
                skips.add("oversized_file", url, f"{member.name} has {member.size:,} bytes")
            else:
                left -= member.size
                sample[suffix] = content.read()
    if headers.damaged and not headers.found:
        raise tarfile.ReadError("not a tar archive")
    headers.tell()
    if sample:
        yield sample


class _Header(tarfile.TarInfo):
    """tarfile's headers, which count the damage that `ignore_zeros` skips silently.

    A header that is not believed is raised as an invalid one: tarfile then looks for the next. It
    knows the class alone, so every archive has its own one.
    """

    url: ClassVar[str]
    skips: ClassVar[Skips]
    found = damaged = False
    gap = 0

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError:
            cls.damaged |= any(buf)
            cls.gap += 1
            if cls.gap > MOST_GAP:
                raise tarfile.ReadError("no header in 1 GiB") from None
            raise
        most = MOST_NOTE if header.type in DESCRIPTIONS else MOST_CLAIMED
        if not 0 <= header.size <= most:
            cls.skips.add("oversized_file", cls.url, f"{header.name} claims {header.size:,} bytes")
            raise tarfile.InvalidHeaderError  # type: ignore[attr-defined]
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(archive)
        except tarfile.SubsequentHeaderError as error:  # type: ignore[attr-defined]
            # The header after a description is damaged; tarfile would end here.
            raise tarfile.InvalidHeaderError(str(error)) from None  # type: ignore[attr-defined]

    @classmethod
    def tell(cls) -> None:
        """Count damage since the last header, unless no header came before it."""
        if cls.damaged and cls.found:
            reason = "no header where one should be; the file that it names is lost"
            cls.skips.add("damaged_header", cls.url, reason)
        cls.found, cls.damaged, cls.gap = True, False, 0


LASTING = (PermanentError, FileNotFoundError, PermissionError, ImportError, ValueError)
"""Errors that another attempt would meet again."""


@dataclass(frozen=True)
class Patience:
    """Timeouts and retries for remote shards.

    Attributes:
        seconds: For a connection and its first 256 kB, and for each 256 kB that follow.
        attempts: To open or continue, in a row without a new byte.
        pause: Seconds before the second attempt; doubled each time.
    """

    seconds: float = 60.0
    attempts: int = 5
    pause: float = 1.0


def open_shard(url: str, patience: Patience | None = None) -> BufferedReader:
    """Bytes of a shard.

    Raises:
        OSError: It is not there, or does not answer; the same while reading.
        ValueError: It is a command that nobody allowed.
    """
    if is_local(url):
        return BufferedReader(local_path(url).open("rb", buffering=0), BUFFER)
    if url.startswith("pipe:") and not isinstance(url, AllowedCommand):
        raise ValueError(_refusal(url))
    patience = patience or Patience()
    return BufferedReader(_Resumed(url, patience), BUFFER)


class _Web:
    """A file of a web server from one byte on. fsspec keeps the session; the requests are ours.

    fsspec's own files ask for the size first, which signed addresses refuse, believe that every
    range is the one that they asked for, and wait for ever for a server that drips.
    """

    def __init__(self, url: str, start: int, seconds: float) -> None:
        options = {"trust_env": True, "timeout": ClientTimeout(total=None)}
        self._files = fsspec.filesystem(
            "http", skip_instance_cache=True, client_kwargs=options, encoded="%" in url
        )
        self._seconds = seconds
        self.answer: ClientResponse | None = None
        self._ahead = b""
        try:
            self._within(self._get(url, start))
        except BaseException:
            self.close()
            raise

    def read(self, size: int) -> bytes:
        data: bytes = self._ahead[:size] or self._within(self._fill(size))
        self._ahead = self._ahead[size:]
        return data

    def close(self) -> None:
        self._within(self._end())

    def _within(self, exchange: Coroutine[Any, Any, Any]) -> Any:
        return sync(self._files.loop, lambda: exchange, timeout=self._seconds)

    async def _get(self, url: str, start: int) -> None:
        session = await self._files.set_session()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        self.answer = await session.get(self._files.encode_url(url), headers=headers)
        self.answer.raise_for_status()
        given = self.answer.headers.get("Content-Range", "")
        if self.answer.status == 206 and not given.startswith(f"bytes {start}-"):
            raise OSError(f"the server sent {given or 'no range'} where bytes {start}- were wanted")
        # At once: of a connection that broke since, aiohttp gives up even what had arrived.
        self._ahead = await self._fill(BUFFER)

    async def _fill(self, size: int) -> bytes:
        assert self.answer is not None
        data = b""
        try:
            while len(data) < size and (more := await self.answer.content.read(size - len(data))):
                data += more
        except Exception:
            if not data:
                raise  # else what came before counts, and the next read meets the error
        return data

    async def _end(self) -> None:
        if self.answer is not None:
            self.answer.close()
        await (await self._files.set_session()).close()


class _Command:
    """What a shell command prints, from its beginning."""

    def __init__(self, command: str, seconds: float) -> None:
        self._seconds = seconds
        self._process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # so that what the shell starts can be ended as well
        )

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], self._seconds)[0]:
            raise TimeoutError(f"the command printed nothing for {self._seconds:g} s")
        data: bytes = self._process.stdout.read(size)
        if not data and (code := self._process.wait(self._seconds)):
            raise OSError(f"the command ended with {code}")
        return data

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


class _Resumed(RawIOBase):
    """One stream out of as many connections as it takes."""

    def __init__(self, url: str, patience: Patience) -> None:
        super().__init__()
        self._url, self._patience = url, patience
        self._file: Any = None
        self._version: str | None = None
        self._position = self._failures = 0
        self._trusted = 4 * BUFFER  # at this byte failures are forgiven

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes; 0 at the end.

        Raises:
            OSError: After the last attempt.
        """
        while True:
            try:
                self._file = self._file or self._connect()
                data = self._file.read(min(len(buffer), BUFFER))  # each within the time limit
            except Exception as error:  # each library has its own
                self._wait_or_give_up(error)
                continue
            buffer[: len(data)] = data
            self._position += len(data)
            if self._position >= self._trusted:
                self._failures, self._trusted = 0, self._position + 4 * BUFFER
            return len(data)

    def close(self) -> None:
        """End the connection."""
        self._drop()
        super().close()

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # a broken one may fail at that, too
                file.close()

    def _connect(self) -> Any:
        """A file that is where the last one stopped."""
        scheme, start = urlsplit(self._url).scheme, self._position
        if scheme in ("http", "https"):
            self._file = web = _Web(self._url, start, self._patience.seconds)
            assert web.answer is not None
            version = web.answer.headers.get("ETag") or web.answer.headers.get("Last-Modified")
            if self._version not in (None, version):
                raise PermanentError("it has changed on the server since its beginning was read")
            self._version = version
            start = 0 if web.answer.status != 206 else start
        elif scheme == "pipe":
            self._file = _Command(self._url.removeprefix("pipe:"), self._patience.seconds)
            start = 0
        else:
            self._file = fsspec.open(self._url, block_size=16 * BUFFER).open()
            self._file.seek(start)
        while start < self._position:  # a server without ranges begins anew
            data = self._file.read(min(BUFFER, self._position - start))
            if not data:
                raise PermanentError("it is shorter than before")
            start += len(data)
        return self._file

    def _wait_or_give_up(self, error: Exception) -> None:
        self._drop()
        self._failures += 1
        answer = getattr(error, "response", None)  # of huggingface_hub; aiohttp has the number
        status = getattr(error, "status", None) or getattr(answer, "status_code", None)
        if isinstance(error, TimeoutError):
            is_permanent, reason = False, str(error) or f"no data in {self._patience.seconds:g} s"
        elif status is None:
            is_permanent = isinstance(error, (*LASTING, NonHttpUrlClientError))
            reason = masked(str(error)) or type(error).__name__
        else:
            is_permanent = status < 500 and status not in (408, 425, 429)
            reason = f"the server says {status} {http.client.responses.get(status, '')}"
        if is_permanent:
            raise PermanentError(reason) from error
        if self._failures >= self._patience.attempts:
            raise OSError(f"{reason}; {self._failures} attempts") from error
        time.sleep(self._patience.pause * 2 ** (self._failures - 1))
