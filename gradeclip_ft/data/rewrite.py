"""Shards rewritten: with phrases in every sample's JSON, or split into more of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from gradeclip_ft.data.phrase_index import KEY, phrase_entry
from gradeclip_ft.data.samples import captions_of, read_record, text_of
from gradeclip_ft.data.shards import new_folder, ranges, write_shard, write_sizes
from gradeclip_ft.data.sizes import sample_counts
from gradeclip_ft.data.stream import BadSampleError, RawSample, Skips, read_shard
from gradeclip_ft.text.phrases import RULE, Phrases
from gradeclip_ft.text.taggers import load_tagger


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
    target = out / url.rsplit("/", 1)[-1]
    if _is_done(target, tagger, max_phrases):
        return Counter({"shards_done_before": 1})
    phrases = Phrases(load_tagger(tagger), max_phrases)
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


def _with_phrases(raw: RawSample, phrases: Phrases, numbers: Counter[str]) -> RawSample:
    try:
        record = read_record(raw)
        captions = list(dict.fromkeys([*_own_caption(raw), *captions_of(record)]))
    except BadSampleError as error:
        numbers[str(error.args[0])] += 1
        return raw
    entry = phrase_entry(captions, phrases)
    numbers["captions"] += len(captions)
    numbers["phrases"] += sum(map(len, entry["found"].values()))
    numbers["captions_without_phrase"] += sum(not found for found in entry["found"].values())
    return {**raw, "json": json.dumps({**record, KEY: entry}).encode()}


def _own_caption(raw: RawSample) -> Iterator[str]:
    line = " ".join(text_of(raw).split())
    if line:
        yield line


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
