"""How many samples each shard holds: from `sizes.json` beside it, or from a local shard's headers.

`data count out=` writes that file: {"NAME.tar": {"samples": n, "bytes": b}}. For a local shard it
counts only where the bytes agree.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from gradeclip_ft.data.stream import Skips, is_local, local_path, read_shard

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
        name = url.rsplit("/", 1)[-1]
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
    archive = _open_plain(path)
    if archive is None:
        yield from (raw["__key__"] for raw in read_shard(str(path), Skips()))
        return
    previous = None
    with archive:
        for key in _member_keys(archive):
            if key is None:
                return  # the shard breaks off; what has begun is lost, as in the reader
            if previous not in (None, key):
                yield previous  # the next sample has begun, so this one is complete
            previous = key
    if previous is not None:
        yield previous


def fingerprint(urls: Sequence[str]) -> str:
    """16 hex digits over names and, for local shards, sizes in bytes."""
    lines = [
        f"{url.rsplit('/', 1)[-1]} {local_path(url).stat().st_size if is_local(url) else ''}"
        for url in urls
    ]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _open_plain(path: Path) -> tarfile.TarFile | None:
    """The archive, if one can jump from header to header; compressed ones must be read through."""
    try:
        return tarfile.open(path, "r:")
    except (OSError, ValueError, tarfile.TarError):
        return None


def _member_keys(archive: tarfile.TarFile) -> Iterator[str | None]:
    """Key of each file, in order; None where the archive breaks off."""
    try:
        for member in archive:
            if not member.isreg() or re.match(r"__[^/]*__($|/)", member.name):
                continue
            if not _complete(archive, member):
                break
            key, _ = base_plus_ext(member.name)
            if key is not None:
                yield key
        else:
            return
    except (OSError, ValueError, tarfile.TarError):
        pass
    yield None


def _complete(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    """Whether the last byte of a file is there; costs no more than the way to the next header."""
    if member.size == 0 or archive.fileobj is None:
        return True
    archive.fileobj.seek(member.offset_data + member.size - 1)
    return len(archive.fileobj.read(1)) == 1


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
    folder, name = url.rsplit("/", 1)
    entry = _read_sizes(f"{folder}/{SIZES}").get(name)
    if entry is None:
        raise ValueError(
            f"{folder}/{SIZES} does not list {name}; write it anew with `data count out=`"
        )
    return entry[0]


@cache
def _read_sizes(url: str, modified: int = 0) -> dict[str, tuple[int, int]]:
    """Samples and bytes by name of the shard."""
    try:
        with gopen(url) as stream:
            content = json.loads(stream.read())
        return {
            name: (int(entry["samples"]), int(entry["bytes"])) for name, entry in content.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"without resampling the number of samples of each shard must be known, and {url} "
            f"cannot be read ({error}); write it with `data count out=`, or set resampled=true"
        ) from error
