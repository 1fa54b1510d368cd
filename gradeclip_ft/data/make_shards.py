"""Writing shards in CC3M's layout: NNNNNNNNN.jpg, .txt and .json per sample, and `sizes.json`."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from PIL import Image
from webdataset.writer import TarWriter

from gradeclip_ft.data.captions import KEY, SIZES, phrase_entry, sample_counts
from gradeclip_ft.data.samples import (
    captions_of,
    check_image_of,
    image_of,
    read_caption,
    read_record,
)
from gradeclip_ft.data.shards import BadSampleError, RawSample, Skips, read_shard, shard_name
from gradeclip_ft.text.phrases import RULE, PhraseFinder, load_tagger

FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
LEAST_SHARDS = 8


@dataclass(frozen=True)
class CaptionedFile:
    """An image file with its captions.

    Attributes:
        image: The file.
        captions: In order; the first goes into `.txt`, all into `.json`.
        record: More for the `.json`.
    """

    image: Path
    captions: tuple[str, ...]
    record: dict[str, Any] = field(default_factory=dict)


def write_shards(
    files: Sequence[CaptionedFile], out: Path, *, name: str, shard_size: int, skips: Skips
) -> dict[str, int]:
    """Writes the files as shards `NAME-0000.tar` and so on, at least 8 where that is possible.

    Args:
        files: What to write, in order. Files that are not usable images or have no caption are left
            out and counted.
        out: A new or empty folder; it is filled at once, when all is written.
        name: Of the shards.
        shard_size: Samples per shard, at most.
        skips: Counts what is left out.

    Returns:
        Samples by name of the shard.

    Raises:
        FileExistsError: The folder is not empty.
        ValueError: No file can be used.
    """
    with new_folder(out) as folder:
        sizes = {}
        for number, rows in enumerate(ranges(len(files), shard_size)):
            samples = _samples(files, rows, skips)
            sizes[f"{name}-{number:04d}.tar"] = write_shard(
                folder / f"{name}-{number:04d}.tar", samples
            )
        if not sum(sizes.values()):
            causes = skips.causes() or "no file named"
            raise ValueError(f"none of {len(files)} files can be used ({causes})")
        write_sizes(folder, sizes)
    return sizes


def write_shard(path: Path, samples: Iterable[RawSample]) -> int:
    """Writes one shard; equal samples give equal bytes.

    Returns:
        The number of samples.
    """
    count = 0
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
            count += 1
    return count


def write_sizes(folder: Path, sizes: dict[str, int]) -> None:
    """Writes `sizes.json` for the shards of a folder."""
    content = {
        name: {"samples": count, "bytes": (folder / name).stat().st_size}
        for name, count in sizes.items()
    }
    (folder / SIZES).write_text(json.dumps(content, indent=1))


def ranges(count: int, shard_size: int) -> list[range]:
    """Rows of each shard: nearly equal sizes, at most `shard_size`, at least 8 shards.

    >>> [len(rows) for rows in ranges(39, 1000)]
    [4, 5, 5, 5, 5, 5, 5, 5]
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; use 1 or more")
    shards = max(min(LEAST_SHARDS, count), -(-count // shard_size))
    edges = [count * number // max(shards, 1) for number in range(shards + 1)]
    return [range(start, stop) for start, stop in pairwise(edges)]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `out` when everything went well.

    Raises:
        FileExistsError: `out` is a file, or a folder that is not empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty; name another folder, or empty it yourself")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
        fresh = Path(aside) / "fresh"
        fresh.mkdir()
        yield fresh
        os.replace(fresh, out)


def _samples(files: Sequence[CaptionedFile], rows: range, skips: Skips) -> Iterator[RawSample]:
    for row in rows:
        try:
            yield _sample(files[row], f"{row:09d}")
        except BadSampleError as error:
            skips.add(str(error.args[0]), str(files[row].image), error.args[-1])


def _sample(file: CaptionedFile, key: str) -> RawSample:
    """A format that the loader does not read becomes a JPEG."""
    captions = [line for text in file.captions if (line := " ".join(text.split()))]
    if not captions:
        raise BadSampleError("missing_text", "it has no caption")
    try:
        content = file.image.read_bytes()
    except OSError as error:
        raise BadSampleError("missing_image", error.strerror) from error
    check_image_of({"jpg": content})
    with Image.open(io.BytesIO(content)) as header:
        suffix, (width, height) = FORMATS.get(str(header.format)), header.size
    if suffix is None:
        buffer = io.BytesIO()
        image_of({"jpg": content}).save(buffer, "jpeg", quality=95)
        suffix, content = "jpg", buffer.getvalue()
    record: RawSample = {"key": key, "caption": captions[0], "captions": captions}
    record |= {"source": file.image.name, "width": width, "height": height, **file.record}
    sample = {suffix: content, "txt": captions[0].encode(), "json": json.dumps(record).encode()}
    return {"__key__": key, **sample}


def add_phrases(url: str, out: Path, *, tagger: str, max_phrases: int) -> Counter[str]:
    """Writes a shard again into the folder `out`, with the phrases of all captions in the JSON.

    The new shard takes its place when it is complete, so `out` may be the folder it came from. A
    shard that has phrases of these settings already is left alone. Samples without a usable
    caption are copied as they are.

    Args:
        url: The shard.
        out: An existing folder.
        tagger: Name of the tagger.
        max_phrases: Per caption; loaders that want fewer take the first ones.

    Returns:
        Numbers of samples, captions, phrases, captions without a phrase, and of what was skipped.
    """
    target = out / re.sub(r"\.(tar\.\w+|tgz)$", ".tar", shard_name(url))
    if _is_done(target, tagger, max_phrases):
        return Counter({"shards_done_before": 1})
    phrases = PhraseFinder(load_tagger(tagger), max_phrases)
    skips, numbers = Skips(), Counter[str]()
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        samples = (_with_phrases(raw, phrases, numbers) for raw in read_shard(url, skips))
        numbers["samples"] = write_shard(aside, samples)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return numbers + skips.total


def split_shards(urls: Sequence[str], out: Path, *, name: str, shard_size: int) -> dict[str, int]:
    """Writes the samples of some shards as more, smaller ones.

    Returns:
        Samples by name of the shard.

    Raises:
        FileExistsError: The folder is not empty.
        ValueError: There is no sample.
    """
    total = sum(sample_counts(urls))
    if not total:
        raise ValueError(f"{len(urls)} shards hold no sample; see why with `data verify`")
    skips, sizes = Skips(), {}
    stream = (raw for url in urls for raw in read_shard(url, skips))
    with new_folder(out) as folder:
        for number, rows in enumerate(ranges(total, shard_size)):
            shard = f"{name}-{number:04d}.tar"
            sizes[shard] = write_shard(folder / shard, islice(stream, len(rows)))
        write_sizes(folder, sizes)
    return sizes


def _with_phrases(raw: RawSample, phrases: PhraseFinder, numbers: Counter[str]) -> RawSample:
    try:
        record = read_record(raw)
        first = read_caption(raw, record, "text", key=0)
        captions = list(dict.fromkeys([first, *captions_of(raw, record)]))
    except BadSampleError as error:
        numbers[str(error.args[0])] += 1
        return raw
    entry = phrase_entry(captions, phrases)
    numbers["captions"] += len(captions)
    numbers["phrases"] += sum(map(len, entry["found"].values()))
    numbers["captions_without_phrase"] += sum(not found for found in entry["found"].values())
    return {**raw, "json": json.dumps({**record, KEY: entry}).encode()}


def _is_done(path: Path, tagger: str, max_phrases: int) -> bool:
    """Whether the first sample with phrases has them from these settings."""
    if not path.is_file():
        return False
    for raw in read_shard(str(path), Skips()):
        try:
            entry = read_record(raw).get(KEY)
        except BadSampleError:
            continue
        wanted = {"rule": RULE, "tagger": tagger, "max_phrases": max_phrases}
        return isinstance(entry, dict) and all(entry.get(k) == v for k, v in wanted.items())
    return False
