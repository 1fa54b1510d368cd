"""Shards to raw samples: their addresses, and reading that survives broken ones and counts them.

webdataset opens and groups; every shard is read on its own, so a broken one costs what is left of
it and nothing else.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from webdataset.gopen import gopen, gopen_schemes
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

RawSample = dict[str, Any]
"""One sample as webdataset groups it: `__key__`, `__url__`, and bytes by file suffix."""

LOG_EVERY = 1000
logger = logging.getLogger(__name__)


class BadSampleError(Exception):
    """A sample that cannot be used; its first argument is the cause."""


@dataclass
class Skips:
    """Counts what is dropped, by cause; logs the first of each cause and then every 1,000th.

    Attributes:
        recent: Counts since they were last taken.
        total: All counts.
        tell: Called with cause, place and reason of each, instead of logging.
    """

    recent: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)
    tell: Callable[[str, str, str], None] | None = None

    def add(self, cause: str, where: str, error: object = "") -> None:
        """Note one dropped shard, file or sample."""
        self.recent[cause] += 1
        self.total[cause] += 1
        if self.tell is not None:
            self.tell(cause, where, str(error))
        elif self.total[cause] % LOG_EVERY == 1:
            logger.warning("skipped %s (%s, number %d): %s", where, cause, self.total[cause], error)

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        taken = dict(self.recent)
        self.recent.clear()
        return taken


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
            f"no shard in {shards!r}; name files, a folder, a glob or addresses"
        )
    twice = [url for url, count in Counter(found).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} shards are listed twice, first {twice[0]}; list each once")
    missing = [url for url in found if is_local(url) and not local_path(url).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(found)} shards do not exist, first {missing[0]}; fetch them "
            "or correct shards="
        )
    return found


def is_local(url: str) -> bool:
    """Whether a shard is a file of this machine."""
    return urlparse(url).scheme in ("", "file")


def local_path(url: str) -> Path:
    """The file behind a local address."""
    return Path(url2pathname(urlparse(url).path) if url.startswith("file:") else url)


def read_shard(url: str, skips: Skips) -> Iterator[RawSample]:
    """Samples of one shard in their order; what cannot be read is counted.

    A shard that breaks off loses its tail, one that cannot be opened or holds nothing loses all.
    """
    found = 0
    try:
        with gopen(url) as stream:
            files = tar_file_expander(iter([{"url": url, "stream": stream}]))
            for sample in group_by_keys(files, handler=partial(_drop_duplicate, skips, url)):
                found += 1
                yield sample
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        cut = found > 0 or "unexpected end" in str(error)
        skips.add("truncated_shard" if cut else "unreadable_shard", url, _reason(error))
    else:
        if not found:
            skips.add("empty_shard", url, "it holds no sample")


def stable_hash(text: str) -> int:
    """63 bits that are the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def _expand(url: str, allow_pipe: bool) -> list[str]:
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise ValueError(
                f"{url!r} would run a shell command; set allow_pipe=true if you mean it"
            )
        return [url]
    if not is_local(url):
        scheme = urlparse(url).scheme
        if scheme not in gopen_schemes:
            known = ", ".join(sorted(set(gopen_schemes) - {"__default__", "pipe"}))
            raise ValueError(
                f"{url}: shards cannot be read by {scheme}:, only by {known}; copy them here, or "
                "use pipe:COMMAND with allow_pipe=true"
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
    """The message without what webdataset hangs on to it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error.args[0] if error.args else error).split(" @ ")[0]


def _drop_duplicate(skips: Skips, url: str, error: Exception) -> bool:
    """Webdataset's handler: go on behind a second file of the same name, and only there."""
    if isinstance(error, ValueError) and "duplicate file name" in str(error.args[0]):
        skips.add("duplicate_name", url, error.args[0])
        return True
    raise error
