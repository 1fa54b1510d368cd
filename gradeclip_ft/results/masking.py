"""What must not enter a record, a log or a terminal: passwords, tokens, signed addresses.

Commands run inside `masked_output`, so that prints, log lines and tracebacks need not mask
anything themselves; files do, with `masked` and `masked_values`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from typing import Any

MASK = "***"
SECRET_NAME = r"(?:api_?key|access_?key(?:_?id)?|token|secret|passw(?:or)?d|credentials?|signature)"
NAMED = re.compile(rf"(?:^|[._-]){SECRET_NAME}$", re.IGNORECASE)
ASSIGNED = re.compile(
    rf"((?:^|[\s'\"+._-]){SECRET_NAME}['\"]?\s*[=:]\s*['\"]?)(?!\*\*\*)[^\s,'\"}}]+", re.IGNORECASE
)
BEARER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
USER = re.compile(r"([a-z][\w+.-]*://)[^/\s'\"]+@", re.IGNORECASE)  # to the last @ of the host
QUERY = re.compile(r"([a-z][\w+.-]*://[^\s?'\"]+\?)[^\s'\"#]+", re.IGNORECASE)
IN_ENVIRONMENT = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
SHORTEST = 8  # shorter values of such variables occur in ordinary words


def masked(text: str) -> str:
    """Without credentials, queries of addresses, and values of names such as `api_key`.

    >>> masked("https://me:pw@host/a.tar?X-Amz-Signature=0 gave 403")
    'https://***@host/a.tar?*** gave 403'
    """
    for value in secrets_of_environment():
        text = text.replace(value, MASK)
    text = USER.sub(rf"\1{MASK}@", text)
    text = QUERY.sub(rf"\1{MASK}", text)
    text = BEARER.sub(rf"\1 {MASK}", text)
    return ASSIGNED.sub(rf"\1{MASK}", text)


def masked_values(value: Any, *, named: bool = True) -> Any:
    """Plain containers without secrets in their texts and, if `named`, below keys that name one."""
    if isinstance(value, Mapping):
        return {
            key: MASK
            if named and entry and NAMED.search(str(key))
            else masked_values(entry, named=named)
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked_values(entry, named=named) for entry in value]
    return masked(value) if isinstance(value, str) else value


def masked_texts(value: Any) -> Any:
    """The same where keys, such as class names, say nothing about secrets."""
    return masked_values(value, named=False)


@cache
def secrets_of_environment() -> tuple[str, ...]:
    """Values of variables with such a name, as they were at the first use."""
    return tuple(
        value
        for name, value in os.environ.items()
        if IN_ENVIRONMENT.search(name.upper()) and len(value) >= SHORTEST
    )


@contextmanager
def masked_output() -> Iterator[None]:
    """While this is open, nothing that is printed or logged shows a secret."""
    with redirect_stdout(_MaskedStream(sys.stdout)), redirect_stderr(_MaskedStream(sys.stderr)):
        yield


class _MaskedStream:
    """A text stream that masks what is written to it; all else is that of the stream."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(masked(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
