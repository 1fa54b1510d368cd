"""Caption data for training: shards in CC3M's layout to batches (section 5.2 of the paper).

`CaptionShards` is the settings, `prepare` runs once before workers start, `loader` gives one
epoch of one process. Everything is a function of (seed, epoch, rank, world size, workers): there
is no state to save, and an interrupted epoch goes on with `start`.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from webdataset.tariterators import base_plus_ext

from gradeclip_ft.batch import CaptionBatch, PackedTexts
from gradeclip_ft.data.order import Place, each_sample_once, resampled, slice_of
from gradeclip_ft.data.samples import (
    MOST_CHARACTERS,
    CaptionChoice,
    check_image_of,
    image_of,
    read_caption,
    read_record,
    sample_name,
)
from gradeclip_ft.data.shards import (
    META,
    BadSampleError,
    RawSample,
    Skips,
    entries,
    expand_shards,
    is_local,
    local_path,
    open_shard,
    printable,
    read_shard,
    shard_name,
    stable_hash,
)
from gradeclip_ft.ops.distributed import heed_parent_alone
from gradeclip_ft.text.phrases import RULE, Phrases, TaggerKind, load_tagger, prepare_tagger
from gradeclip_ft.text.prompts import phrase_prompt

KEY = "phrases"


def phrase_entry(captions: Sequence[str], phrases: Phrases) -> dict[str, Any]:
    """What a sample's JSON gets under "phrases"."""
    return {
        "rule": RULE,
        "tagger": phrases.tagger.name,
        "max_phrases": phrases.max_phrases,
        "found": {caption: phrases(caption) for caption in captions},
    }


def stored_phrases(
    record: Mapping[str, Any], caption: str, *, tagger: str, max_phrases: int
) -> list[str] | None:
    """Phrases of a caption from its sample's JSON; None if they were made with other settings.

    Phrases made with a higher `max_phrases` serve too: the first ones are the same.
    """
    entry = record.get(KEY)
    if not isinstance(entry, Mapping):
        return None
    stored, found = entry.get("max_phrases"), entry.get("found")
    same = entry.get("rule") == RULE and entry.get("tagger") == tagger
    enough = isinstance(stored, int) and stored >= max_phrases
    if not (same and enough and isinstance(found, Mapping) and caption in found):
        return None
    phrases = found[caption]
    if not isinstance(phrases, list) or not all(map(_is_phrase, phrases)):
        return None
    return phrases[:max_phrases]


def _is_phrase(entry: object) -> bool:
    """Words of a caption, in characters that every tokenizer knows."""
    return isinstance(entry, str) and 0 < len(entry) <= MOST_CHARACTERS and entry.isprintable()


Transform = Callable[[Image.Image], Tensor]
"""Image to pixels (3, H, W); draws random numbers from torch's default generator alone."""

MOST_BAD_SAMPLES = 10_000
EMPTY_LENGTH = 8


@runtime_checkable
class Tokenize(Protocol):
    """Texts to token ids (M, L); `trim` cuts behind the longest text where that is exact."""

    def __call__(self, texts: list[str], *, trim: bool = False) -> Int[Tensor, "M L"]:
        """Token ids of some texts."""
        ...

    def pack(self, *groups: Int[Tensor, "_ _"]) -> PackedTexts | None:
        """Token ids in few rows, for towers that take them."""
        ...


@dataclass(frozen=True)
class Sample:
    """One usable sample."""

    key: str
    image: Float[Tensor, "3 H W"]
    caption: str
    phrases: list[str]


@dataclass(frozen=True)
class Batches:
    """How samples become batches; crosses process boundaries.

    Attributes:
        tokenizer: For captions and phrases.
        transform: For images.
        batch_size: Samples of a batch.
        prompt: Sentence with one {} for a phrase.
        caption: Which caption of a sample.
        tagger: Name of the tagger; None where no phrases are wanted.
        max_phrases: Per caption.
    """

    tokenizer: Tokenize
    transform: Transform
    batch_size: int
    prompt: str
    caption: CaptionChoice
    tagger: str | None
    max_phrases: int

    def __call__(
        self, raws: Iterator[RawSample], place: Place, skips: Skips, *, first: int, count: int
    ) -> Iterator[CaptionBatch]:
        """Batches `first` to `count` of one worker.

        Raises:
            RuntimeError: 10,000 samples in a row cannot be used, or too large a share.
        """
        samples = self._samples(raws, place, skips, first * self.batch_size)
        for _ in range(first, count):
            rows = list(islice(samples, self.batch_size))
            yield collate(rows, self.tokenizer, self.prompt, skips.take())

    def _samples(
        self, raws: Iterator[RawSample], place: Place, skips: Skips, first: int
    ) -> Iterator[Sample]:
        """Usable samples from number `first` on; those before are only checked."""
        phrases = Phrases(load_tagger(self.tagger), self.max_phrases) if self.tagger else None
        number = bad = 0
        for raw in raws:
            skips.seen["sample"] += 1
            try:
                if number < first:
                    self._check(raw)
                    skips.recent.clear()  # already reported before the interruption
                else:
                    yield self._read(raw, place.key(f"sample{number}"), phrases)
            except BadSampleError as error:
                skips.drop("sample", str(error.args[0]), sample_name(raw), error.args[-1])
                bad += 1
                if bad == MOST_BAD_SAMPLES:
                    raise _hopeless(skips) from error
            else:
                bad = 0
                number += 1

    def _check(self, raw: RawSample) -> None:
        read_caption(raw, self._record(raw), self.caption, key=0)
        check_image_of(raw)

    def _read(self, raw: RawSample, key: int, phrases: Phrases | None) -> Sample:
        record = self._record(raw)
        caption = read_caption(raw, record, self.caption, key)
        image = image_of(raw)
        found = self._phrases(record, caption, phrases) if phrases else []
        return Sample(sample_name(raw), _augmented(self.transform, image, key), caption, found)

    def _record(self, raw: RawSample) -> dict[str, Any]:
        """The JSON where something in it is wanted; most of CC3M's is not."""
        wanted = self.caption == "any" or f'"{KEY}"'.encode() in raw.get("json", b"")
        return read_record(raw) if wanted else {}

    def _phrases(self, record: dict[str, Any], caption: str, phrases: Phrases) -> list[str]:
        stored = stored_phrases(
            record, caption, tagger=phrases.tagger.name, max_phrases=self.max_phrases
        )
        return phrases(caption) if stored is None else stored


def collate(
    samples: Sequence[Sample], tokenizer: Tokenize, prompt: str, skipped: dict[str, int]
) -> CaptionBatch:
    """Samples to one batch; each distinct phrase is tokenised once.

    Without any phrase, `distinct` has shape (0, 8), and `phrase` and `owner` are empty.
    """
    row: dict[str, int] = {}
    phrase = [row.setdefault(text, len(row)) for sample in samples for text in sample.phrases]
    counts = torch.tensor([len(sample.phrases) for sample in samples])
    prompts = [phrase_prompt(prompt, text) for text in row]
    captions = tokenizer([sample.caption for sample in samples], trim=True)
    nothing = torch.zeros((0, EMPTY_LENGTH), dtype=torch.long)
    distinct = tokenizer(prompts, trim=True) if prompts else nothing
    return CaptionBatch(
        images=torch.stack([sample.image for sample in samples]),
        captions=captions,
        distinct=distinct,
        identity=torch.tensor([stable_hash(text) for text in row], dtype=torch.long),
        phrase=torch.tensor(phrase, dtype=torch.long),
        owner=torch.arange(len(samples)).repeat_interleave(counts),
        packed=tokenizer.pack(captions, distinct),
        keys=tuple(sample.key for sample in samples),
        skipped=skipped,
    )


def _augmented(transform: Transform, image: Image.Image, seed: int) -> Tensor:
    """The transform with random numbers of its own: every sample's, whatever was read before."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        return transform(image)
    finally:
        generator.set_state(state)


def _hopeless(skips: Skips) -> RuntimeError:
    return RuntimeError(
        f"{MOST_BAD_SAMPLES} samples in a row cannot be used ({skips.causes()}); "
        "see why with `data verify`"
    )


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


def in_foreign_worker() -> bool:
    """Whether this process was started by a method of somebody else, joblib's for example.

    Children that are spawned from such a process fail: they know that method no more than we do.
    """
    return multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods()


def evaluation_loader(
    items: Dataset[Any], join: Callable[[Any], Any], *, batch_size: int, workers: int
) -> DataLoader[Any]:
    """All items once, in order, in batches; leaves torch's global random state alone.

    Args:
        items: Samples by number.
        join: Samples to a batch.
        batch_size: Samples per batch; the last one may be smaller.
        workers: Processes; 0 loads here.
    """
    return DataLoader(
        items,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=join,
        generator=torch.Generator(),
        worker_init_fn=heed_parent_alone,
        multiprocessing_context="fork" if workers and in_foreign_worker() else None,
    )


StartMethod = Literal["fork", "forkserver", "spawn"]


@dataclass(frozen=True, kw_only=True)
class CaptionShards:
    """Shards of captioned images, and how they become batches.

    Attributes:
        shards: Files, folders, globs, addresses, with brace lists; see `expand_shards`.
        batch_size: Samples per process and batch.
        tokenizer: Of the model; called with `trim=True`.
        transform: Of the model, for training; draws from torch's default generator alone.
        samples_per_epoch: Over all processes. An epoch has samples_per_epoch // (batch_size x
            world size) batches in every process. None: all samples; needs `resampled: false`.
        workers: Loader processes per process; 0 reads in the process itself.
        resampled: Draw shards at random, with replacement. Otherwise every sample comes once per
            epoch, except the last few that do not fill a batch in every process.
        shuffle: Samples per worker that are mixed; 0 keeps their order.
        caption: The caption in .txt, or at each visit any of the `captions` in .json.
        max_phrases: The first so many phrases of a caption; 0 finds none and needs no tagger.
        prompt: Sentence with one {} for a phrase.
        tagger: "auto" is NLTK where its data can be had, else TextBlob's lexicon.
        max_dropped: Share of a worker's samples, and of its shards, that may be unusable; once it
            has seen 1,000 samples or 20 shards, a larger share stops the run.
        allow_pipe: Accept `pipe:COMMAND` among the shards.
        start_method: How workers start; None leaves it to the platform.
        make: Called by `prepare`, to make the data where they are absent or made otherwise.
    """

    shards: str | Sequence[str]
    batch_size: int
    tokenizer: Tokenize
    transform: Transform
    samples_per_epoch: int | None = None
    workers: int = 2
    resampled: bool = True
    shuffle: int = 1000
    caption: CaptionChoice = "text"
    max_phrases: int = 5
    prompt: str = "This is a photo of the {}"
    tagger: TaggerKind = "auto"
    max_dropped: float = 0.2
    allow_pipe: bool = False
    start_method: StartMethod | None = None
    make: Callable[[], object] | None = None

    def prepare(self) -> dict[str, Any]:
        """Make or check shards and tagger, once per machine, before workers start.

        Returns:
            For the run's record: tagger, number of shards, fingerprint, samples per epoch.

        Raises:
            FileNotFoundError: Shards are missing.
            LookupError: The tagger asked for cannot be used.
            ValueError: A setting makes no sense.
        """
        self._check()
        if self.make is not None:
            self.make()
        urls = self.urls()
        return {
            "tagger": prepare_tagger(self.tagger) if self.max_phrases else None,
            "shards": len(urls),
            "fingerprint": fingerprint(urls),
            "samples_per_epoch": self._epoch_size(urls),
            "resampled": self.resampled,
        }

    def urls(self) -> list[str]:
        """The shards, one by one."""
        return expand_shards(self.shards, allow_pipe=self.allow_pipe)

    def loader(
        self, *, seed: int, epoch: int, rank: int, world_size: int, start: int = 0
    ) -> CaptionLoader:
        """Batches of one process from batch `start` of the epoch on; workers start with iteration.

        Raises:
            ValueError: A setting makes no sense, or shards are too few for the workers.
        """
        self._check()
        urls = self.urls()
        size = self._epoch_size(urls)
        batches = size // (self.batch_size * world_size)
        if batches < 1:
            raise ValueError(
                f"samples_per_epoch {size} is less than one batch of {self.batch_size} for each of "
                f"{world_size} processes; lower batch_size or raise samples_per_epoch"
            )
        consumers = world_size * max(self.workers, 1)
        if not self.resampled and len(urls) < consumers:
            raise ValueError(
                f"{len(urls)} shards cannot be split over {world_size} processes x "
                f"{max(self.workers, 1)} workers; lower workers, split the shards with `data "
                "split`, or set resampled=true"
            )
        if not 0 <= start <= batches:
            raise ValueError(f"start {start} is outside the {batches} batches of an epoch")
        place = Place(seed, epoch, rank, world_size, worker=0, workers=max(self.workers, 1))
        counts = () if self.resampled else tuple(sample_counts(urls))
        settled = replace(self, make=None)  # workers have no use for it, and it may not pickle
        return CaptionLoader(settled, tuple(urls), counts, place, batches, start)

    def _epoch_size(self, urls: Sequence[str]) -> int:
        if self.resampled:
            if self.samples_per_epoch is None:
                raise ValueError(
                    "resampled shards have no end; set samples_per_epoch, or resampled=false"
                )
            return self.samples_per_epoch
        total = sum(sample_counts(urls))
        wanted = total if self.samples_per_epoch is None else self.samples_per_epoch
        if wanted > total:
            raise ValueError(
                f"samples_per_epoch is {wanted}, the shards hold {total}; lower it, leave it null, "
                "or set resampled=true"
            )
        return wanted

    def _check(self) -> None:
        least = {"batch_size": 1, "workers": 0, "shuffle": 0, "max_phrases": 0}
        for name, bound in least.items():
            got = getattr(self, name)
            if got < bound:
                raise ValueError(f"{name} is {got}; it must be at least {bound}")
        if self.samples_per_epoch is not None and self.samples_per_epoch < 1:
            raise ValueError(f"samples_per_epoch is {self.samples_per_epoch}; use 1 or more")
        if not 0 <= self.max_dropped <= 1:
            raise ValueError(f"max_dropped is {self.max_dropped}; give a share from 0 to 1")
        phrase_prompt(self.prompt, "dog")


@dataclass(frozen=True)
class CaptionLoader:
    """One epoch of one process; `len()` is the number of batches of the whole epoch.

    Attributes:
        source: The settings.
        urls: Its shards.
        counts: Samples per shard; empty for resampled shards.
        place: The process.
        batches: Of the whole epoch.
        start: The batch iteration begins with.
    """

    source: CaptionShards
    urls: tuple[str, ...]
    counts: tuple[int, ...]
    place: Place
    batches: int
    start: int

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[CaptionBatch]:
        source = self.source
        tagger = prepare_tagger(source.tagger, fetch=False) if source.max_phrases else None
        loader = DataLoader(
            _WorkerBatches(self, tagger),
            batch_size=None,
            num_workers=source.workers,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=_start_method(source) if source.workers else None,
            worker_init_fn=heed_parent_alone,
            generator=torch.Generator(),  # the loader's own draws leave the run's numbers alone
        )
        return iter(loader)


def _start_method(source: CaptionShards) -> StartMethod | None:
    """As set; inside a job of a joblib sweep, whose own method serves no loader, by fork."""
    return source.start_method or ("fork" if in_foreign_worker() else None)


class _WorkerBatches(IterableDataset[CaptionBatch]):
    """The batches of one worker. torch takes a batch from each worker in turn."""

    def __init__(self, epoch: CaptionLoader, tagger: str | None) -> None:
        self.epoch = epoch
        self.tagger = tagger

    def __iter__(self) -> Iterator[CaptionBatch]:
        epoch, source = self.epoch, self.epoch.source
        info = get_worker_info()
        # torch asks worker 0 first; the first batch wanted is that of worker start % workers
        number = ((info.id if info else 0) + epoch.start) % epoch.place.workers
        place = replace(epoch.place, worker=number)
        skips = Skips(most=source.max_dropped)
        batches = Batches(
            tokenizer=source.tokenizer,
            transform=source.transform,
            batch_size=source.batch_size,
            prompt=source.prompt,
            caption=source.caption,
            tagger=self.tagger,
            max_phrases=source.max_phrases,
        )
        first, count = place.share(epoch.start), place.share(epoch.batches)
        return batches(self._raws(place, skips), place, skips, first=first, count=count)

    def _raws(self, place: Place, skips: Skips) -> Iterator[RawSample]:
        epoch, source = self.epoch, self.epoch.source
        if source.resampled:
            return resampled(epoch.urls, place, shuffle=source.shuffle, skips=skips)
        part = slice_of(place, epoch.batches, source.batch_size)
        return each_sample_once(
            epoch.urls, epoch.counts, part, place, shuffle=source.shuffle, skips=skips
        )
