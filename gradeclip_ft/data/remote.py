"""Shards from anywhere as byte streams: bounded retries, backoff, and no wait without an end.

webdataset's readers wait for a silent server without limit, retry thirty times, and put the access
token of Hugging Face into their error messages. Here a stream that breaks or stalls is opened again
where it stopped, a few times; then the shard counts as unreadable and training goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from gradeclip_ft.data.connections import PROGRAMS, Connect, GoneError, Part, Program, Web
from gradeclip_ft.results.secrets import masked

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
        self._part: Part | None = None
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

    def _reopened(self) -> Part:
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
