"""Shards to raw samples: their addresses, and reading that survives broken ones and counts them.

Every shard is read on its own, so a broken one costs what is broken in it and nothing else.
webdataset groups files to samples.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any, Literal
from urllib.parse import urlsplit

from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

from gradeclip_ft.data.archive import CutOffError, NoArchiveError, entries
from gradeclip_ft.data.connections import SCHEMES
from gradeclip_ft.data.remote import Patience, is_local, local_path, open_shard
from gradeclip_ft.results.secrets import masked

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
