"""Connections to a remote shard: web servers from any byte on, and programs that print a file."""

from __future__ import annotations

import base64
import re
import select
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import cache
from http.client import HTTPResponse
from typing import Protocol, runtime_checkable
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from huggingface_hub import get_token, hf_hub_url

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
class Part(Protocol):
    """A stream that begins somewhere in a file."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes, as soon as there are some; none at the end."""
        ...

    def close(self) -> None:
        """End it, also in the middle."""
        ...


Connect = Callable[[int, float], tuple[Part, int]]
"""First byte wanted and seconds to wait, to a stream and the byte it really begins with."""


class Web:
    """A file behind an address, from any byte on."""

    def __init__(self, url: str) -> None:
        self._url, self._headers = _address(url)
        self._version: str | None = None

    def __call__(self, start: int, seconds: float) -> tuple[Part, int]:
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

    def __call__(self, start: int, seconds: float) -> tuple[Part, int]:
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
