"""How many samples each shard holds: from `sizes.json` beside it, or from a local shard's headers.

`data count out=` writes that file: {"NAME.tar": {"samples": n, "bytes": b}}. For a local shard it
counts only where the bytes agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from webdataset.tariterators import base_plus_ext

from gradeclip_ft.data.archive import entries
from gradeclip_ft.data.remote import is_local, local_path, open_shard, shard_name
from gradeclip_ft.data.stream import META, Skips, printable, read_shard

SIZES = "sizes.json"


def sample_counts(urls: Sequence[str]) -> list[int]:
    """Samples per shard, in order; a shard that cannot be read has as many as can be read.

    Raises:
        ValueError: An address without a `sizes.json` beside it, or one that does not name it.
    """
    return [count_local(local_path(url)) if is_local(url) else _listed(url) for url in urls]


def shard_sizes(urls: Sequence[str]) -> dict[str, dict[str, int]]:
    """What `sizes.json` holds: samples and bytes of each shard, counted anew.

    Raises:
        ValueError: Two shards have the same name; one file cannot tell them apart.
    """
    sizes: dict[str, dict[str, int]] = {}
    for url in urls:
        name = shard_name(url)
        if name in sizes:
            raise ValueError(f"two shards are called {name}; count the shards of one folder only")
        sizes[name] = _measured(url)
    return sizes


def count_local(path: Path) -> int:
    """Samples of a local shard; remembered while the file is the same."""
    status = path.stat()
    listed = path.parent / SIZES
    if listed.is_file():
        entry = _read_sizes(str(listed), listed.stat().st_mtime_ns).get(path.name)
        if entry is not None and entry[1] == status.st_size:
            return entry[0]
    return _count(path, status.st_size, status.st_mtime_ns)


def sample_keys(path: Path) -> Iterator[str]:
    """Keys of the samples of a local shard as the reader groups them, as far as it can be read."""
    previous = None
    try:
        with open_shard(str(path)) as stream:
            for entry in entries(stream, _ignored, read=False):
                key, _ = base_plus_ext(entry.name)
                if key is None or META.match(entry.name):
                    continue
                if previous not in (None, key):
                    yield previous  # the next sample has begun, so this one is complete
                previous = key
    except Exception:  # what has begun is lost, as in the reader, which says why
        return
    if previous is not None:
        yield previous


def fingerprint(urls: Sequence[str]) -> str:
    """16 hex digits over names and, for local shards, sizes in bytes."""
    lines = [
        f"{shard_name(url)} {local_path(url).stat().st_size if is_local(url) else ''}"
        for url in urls
    ]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _ignored(cause: str, reason: str) -> None:
    """The reader counts it."""


def _measured(url: str) -> dict[str, int]:
    if is_local(url):
        path = local_path(url)
        number = sum(1 for _ in sample_keys(path))
        return {"samples": number, "bytes": path.stat().st_size}
    return {"samples": sum(1 for _ in read_shard(url, Skips())), "bytes": -1}


@cache
def _count(path: Path, size: int, modified: int) -> int:
    return sum(1 for _ in sample_keys(path))


def _listed(url: str) -> int:
    folder, name = url.partition("?")[0].rpartition("/")[0], shard_name(url)
    entry = _read_sizes(f"{folder}/{SIZES}").get(name)
    if entry is None:
        raise ValueError(
            f"{printable(folder)}/{SIZES} does not list {name}; write it anew with "
            "`data count out=`"
        )
    return entry[0]


@cache
def _read_sizes(url: str, modified: int = 0) -> dict[str, tuple[int, int]]:
    """Samples and bytes by name of the shard."""
    try:
        with open_shard(url) as stream:
            content = json.loads(stream.read())
        return {
            name: (int(entry["samples"]), int(entry["bytes"])) for name, entry in content.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "without resampling the number of samples of each shard must be known, and "
            f"{printable(url)} cannot be read ({error}); write it with `data count out=`, or set "
            "resampled=true"
        ) from error
