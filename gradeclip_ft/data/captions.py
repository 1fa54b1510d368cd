"""Caption data for training: captioned images to batches (section 5.2 of the paper).

`CaptionData` is the settings that all have in common, `CaptionTrainData` reads shards in CC3M's
layout, `photos.PhotoTrainData` files. `prepare` runs once before workers start, `loader` gives one
epoch of one process. Everything is a function of (seed, epoch, rank, world size, workers): there
is no state to save, and an interrupted epoch continues with `start`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from gradeclip_ft.batch import CaptionBatch, PackedTexts
from gradeclip_ft.data.files import Tokenize
from gradeclip_ft.data.loading import (
    EXPECTED,
    RaisingLoader,
    WorkerError,
    handed_over,
    inside_joblib_worker,
)
from gradeclip_ft.data.order import LoaderWorker, each_sample_once, resampled, slice_of
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
    BadSampleError,
    RawSample,
    Skips,
    TooManyDroppedError,
    expand_shards,
    is_local,
    local_path,
    open_shard,
    printable,
    sample_keys,
    shard_name,
    stable_hash,
)
from gradeclip_ft.ops.distributed import ignore_scheduler_signals
from gradeclip_ft.text.phrases import RULE, PhraseFinder, TaggerKind, load_tagger, prepare_tagger
from gradeclip_ft.text.prompts import phrase_prompt

KEY = "phrases"
SIZES = "sizes.json"
MOST_BAD_SAMPLES = 10_000
EMPTY_LENGTH = 8
logger = logging.getLogger(__name__)
Transform = Callable[[Image.Image], Tensor]
"""Image to pixels (3, H, W); draws random numbers from torch's default generator alone."""


@runtime_checkable
class PackingTokenize(Tokenize, Protocol):
    """Texts to token ids, also packed."""

    def pack(self, *groups: Int[Tensor, "_ _"]) -> PackedTexts | None:
        """Token ids in few rows, for towers that take them."""
        ...

    def warn_of_unknown(self, texts: Iterable[str]) -> None:
        """Log words that are not in the vocabulary."""


Samples = Callable[[LoaderWorker, range, Skips], Iterator[RawSample]]
"""Raw samples of one worker without end: those of a slice of the epoch, each once, and again to
make up for dropped ones. Sent to workers, so it can be pickled."""


@dataclass(frozen=True, kw_only=True)
class CaptionData(ABC):
    """Captioned images, and how they become batches.

    Attributes:
        batch_size: Samples per process and batch.
        tokenizer: Of the model; called with `trim=True`.
        transform: Of the model, for training; draws from torch's default generator alone.
        workers: Loader processes per process; 0 reads in the process itself.
        caption: "text" is the first caption of a sample, "any" another one at each visit.
        max_phrases: Most phrases of a caption, the first ones; 0 disables phrases and the tagger.
        prompt: Sentence with one {} for a phrase.
        tagger: "auto" is NLTK where its data can be had, else TextBlob's lexicon.
        draft: Pixels, as many as the model's images have or more. A JPEG is decoded at a half,
            quarter or eighth of its size where neither side gets shorter than this: faster, and
            not the same pixels. None decodes in full.
        max_dropped: Share of a worker's samples, and of its shards, that may be unusable; once it
            has seen 1,000 samples or 20 shards, a larger share stops the run.
    """

    batch_size: int
    tokenizer: PackingTokenize
    transform: Transform
    workers: int = 2
    caption: CaptionChoice = "text"
    max_phrases: int = 5
    prompt: str = "This is a photo of the {}"
    tagger: TaggerKind = "auto"
    draft: int | None = None
    max_dropped: float = 0.2

    @property
    @abstractmethod
    def resampled(self) -> bool:
        """Whether samples are drawn with replacement, so that no process has a share of its own."""

    @abstractmethod
    def prepare(self) -> dict[str, Any]:
        """Make or check data and tagger, once per machine, before workers start.

        Returns:
            For the run's record: tagger, fingerprint, samples per epoch, and more.

        Raises:
            FileNotFoundError: Data are missing.
            LookupError: The tagger asked for cannot be used.
            ValueError: A setting makes no sense.
        """

    @abstractmethod
    def epoch_size(self) -> int:
        """Samples of an epoch, over all processes."""

    @abstractmethod
    def samples(self, world_size: int) -> Samples:
        """Where the workers of so many processes read."""

    def batches(self, world_size: int) -> int:
        """Batches of an epoch in each process.

        Raises:
            ValueError: There is not one.
        """
        size = self.epoch_size()
        batches = size // (self.batch_size * world_size)
        if batches < 1:
            raise ValueError(
                f"an epoch of {size} samples is less than one batch of {self.batch_size} for each "
                f"of {world_size} processes; lower data.batch_size or give more samples"
            )
        return batches

    def loader(
        self, *, seed: int, epoch: int, rank: int, world_size: int, start: int = 0
    ) -> CaptionLoader:
        """Batches of one process from batch `start` of the epoch on; workers start with iteration.

        Raises:
            ValueError: A setting makes no sense, or shards are too few for the workers.
        """
        self._check()
        batches = self.batches(world_size)
        samples = self.samples(world_size)
        if not 0 <= start <= batches:
            raise ValueError(f"start {start} is outside the {batches} batches of an epoch")
        workers = max(self.workers, 1)
        return CaptionLoader(
            self,
            samples=samples,
            worker=LoaderWorker(seed, epoch, rank, world_size, worker=0, workers=workers),
            batches=batches,
            start=start,
        )

    def _check(self) -> None:
        least = {"batch_size": 1, "workers": 0, "shuffle": 0, "max_phrases": 0}
        for name, bound in least.items():
            got = getattr(self, name, bound)
            if got < bound:
                raise ValueError(f"{name} is {got}; it must be at least {bound}")
        if not 0 <= self.max_dropped <= 1:
            raise ValueError(f"max_dropped is {self.max_dropped}; give a share from 0 to 1")
        phrase_prompt(self.prompt, "dog")


@dataclass(frozen=True, kw_only=True)
class CaptionTrainData(CaptionData):
    """Shards of captioned images.

    Attributes:
        shards: Files, folders, globs, addresses, with brace lists; see `expand_shards`.
        samples_per_epoch: Over all processes. An epoch has samples_per_epoch // (batch_size x
            world size) batches in every process. None: all samples; needs `resampled: false`.
        resampled: Draw shards at random, with replacement. Otherwise every sample comes once per
            epoch, except the last few that do not fill a batch in every process.
        shuffle: Size of the shuffle buffer of each worker, in samples; 0 keeps their order.
        allow_pipe: Accept `pipe:COMMAND` among the shards.
        make: Called by `prepare`, to make the data where they are absent or made otherwise.
    """

    shards: str | Sequence[str]
    samples_per_epoch: int | None = None
    resampled: bool = True
    shuffle: int = 1000
    allow_pipe: bool = False
    make: Callable[[], object] | None = None

    def prepare(self) -> dict[str, Any]:
        """Make or check shards and tagger."""
        self._check()
        if self.make is not None:
            self.make()
        urls = self.urls()
        if not self.resampled:
            empty = [url for url, size in zip(urls, sample_counts(urls), strict=True) if not size]
            if empty:
                logger.warning(
                    "%d of %d shards hold no sample, first %s: an epoch is shorter; see why with "
                    "`data verify`",
                    len(empty),
                    len(urls),
                    printable(empty[0]),
                )
        return {
            "tagger": prepare_tagger(self.tagger) if self.max_phrases else None,
            "shards": len(urls),
            "fingerprint": fingerprint(urls),
            "samples_per_epoch": self.epoch_size(),
            "resampled": self.resampled,
        }

    def loader(self, **place: int) -> CaptionLoader:
        """As of all; workers have no use for `make`, and it may not pickle."""
        return replace(super().loader(**place), source=replace(self, make=None))

    def urls(self) -> list[str]:
        """The shards, one by one."""
        return expand_shards(self.shards, allow_pipe=self.allow_pipe)

    def samples(self, world_size: int) -> Samples:
        """The shards, with their sizes where each sample comes once.

        Raises:
            ValueError: They are too few for the workers.
        """
        urls = self.urls()
        workers = max(self.workers, 1)
        if not self.resampled and len(urls) < world_size * workers:
            raise ValueError(
                f"{len(urls)} shards cannot be split over {world_size} processes x {workers} "
                "workers; lower workers, split the shards with `data split`, or set resampled=true"
            )
        counts = None if self.resampled else tuple(sample_counts(urls))
        return ShardSamples(tuple(urls), counts, self.shuffle)

    def epoch_size(self) -> int:
        """What `samples_per_epoch` says, else all samples."""
        if self.resampled:
            if self.samples_per_epoch is None:
                raise ValueError(
                    "resampled shards have no end; set samples_per_epoch, or resampled=false"
                )
            return self.samples_per_epoch
        total = sum(sample_counts(self.urls()))
        wanted = total if self.samples_per_epoch is None else self.samples_per_epoch
        if wanted > total:
            raise ValueError(
                f"samples_per_epoch is {wanted}, the shards hold {total}; lower it, leave it null, "
                "or set resampled=true"
            )
        return wanted

    def _check(self) -> None:
        super()._check()
        if self.samples_per_epoch is not None and self.samples_per_epoch < 1:
            raise ValueError(f"samples_per_epoch is {self.samples_per_epoch}; use 1 or more")


@dataclass(frozen=True)
class ShardSamples:
    """Samples of shards.

    Attributes:
        counts: Samples per shard; None for shards drawn with replacement.
    """

    urls: tuple[str, ...]
    counts: tuple[int, ...] | None
    shuffle: int

    def __call__(self, worker: LoaderWorker, part: range, skips: Skips) -> Iterator[RawSample]:
        """Those of one worker."""
        if self.counts is None:
            return resampled(self.urls, worker, shuffle=self.shuffle, skips=skips)
        return each_sample_once(
            self.urls, self.counts, part, worker, shuffle=self.shuffle, skips=skips
        )


@dataclass(frozen=True)
class CaptionLoader:
    """One epoch of one process; `len()` is the number of batches of the whole epoch.

    Attributes:
        samples: Where its workers read.
        worker: Numbers of the process; its first worker.
        batches: Of the whole epoch.
        start: The batch iteration begins with.
    """

    source: CaptionData
    samples: Samples
    worker: LoaderWorker
    batches: int
    start: int

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[CaptionBatch]:
        source = self.source
        tagger = prepare_tagger(source.tagger, fetch=False) if source.max_phrases else None
        # A joblib sweep's own start method cannot start the workers of a loader.
        method = "fork" if source.workers and inside_joblib_worker() else None
        loader = RaisingLoader(
            _WorkerBatches(self, tagger),
            batch_size=None,
            num_workers=source.workers,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=method,
            worker_init_fn=ignore_scheduler_signals,
            generator=torch.Generator(),  # the loader's own draws leave the run's numbers alone
        )
        return iter(loader)


class _WorkerBatches(IterableDataset[CaptionBatch | WorkerError]):
    """The batches of one worker. torch takes a batch from each worker in turn."""

    def __init__(self, epoch: CaptionLoader, tagger: str | None) -> None:
        self.epoch = epoch
        self.tagger = tagger

    def __iter__(self) -> Iterator[CaptionBatch | WorkerError]:
        epoch, source = self.epoch, self.epoch.source
        info = get_worker_info()
        # torch asks worker 0 first; the first batch wanted is that of worker start % workers
        number = ((info.id if info else 0) + epoch.start) % epoch.worker.workers
        worker = replace(epoch.worker, worker=number)
        skips = Skips(most=source.max_dropped)
        raws = epoch.samples(worker, slice_of(worker, epoch.batches, source.batch_size), skips)
        first, count = worker.share(epoch.start), worker.share(epoch.batches)
        try:
            yield from read_batches(
                source, self.tagger, raws, worker, skips, first=first, count=count
            )
        except EXPECTED as error:
            yield handed_over(error)


@dataclass(frozen=True)
class Sample:
    """One usable sample."""

    key: str
    image: Shaped[Tensor, "3 H W"]
    caption: str
    phrases: list[str]


def read_batches(
    source: CaptionData,
    tagger: str | None,
    raws: Iterator[RawSample],
    worker: LoaderWorker,
    skips: Skips,
    *,
    first: int,
    count: int,
) -> Iterator[CaptionBatch]:
    """Batches `first` to `count` of one worker; samples of the batches before are only checked.

    Raises:
        TooManyDroppedError: 10,000 samples in a row cannot be used, or too large a share.
    """
    samples = _usable(source, tagger, raws, worker, skips, first * source.batch_size)
    for _ in range(first, count):
        rows = list(islice(samples, source.batch_size))
        yield collate(rows, source.tokenizer, source.prompt, skips.take())


def _usable(
    source: CaptionData,
    tagger: str | None,
    raws: Iterator[RawSample],
    worker: LoaderWorker,
    skips: Skips,
    first: int,
) -> Iterator[Sample]:
    """Usable samples from number `first` on."""
    find = PhraseFinder(load_tagger(tagger), source.max_phrases) if tagger else None
    number = bad = 0
    for raw in raws:
        skips.seen["sample"] += 1
        # Numbered by usable samples, so that a resumed epoch draws the same crops and captions.
        key = worker.key(f"sample{number}")
        try:
            record = read_record(raw)
            caption = read_caption(raw, record, source.caption, key)
            if number < first:
                check_image_of(raw)
                skips.recent.clear()  # already reported before the interruption
            else:
                image = _augmented(source.transform, image_of(raw, source.draft), key)
                phrases = caption_phrases(record, caption, find) if find else []
                yield Sample(sample_name(raw), image, caption, phrases)
        except BadSampleError as error:
            skips.drop("sample", str(error.args[0]), sample_name(raw), error.args[-1])
            bad += 1
            if bad == MOST_BAD_SAMPLES:
                raise TooManyDroppedError(
                    f"{MOST_BAD_SAMPLES} samples in a row cannot be used ({skips.causes()}); "
                    "see why with `data verify`"
                ) from error
        else:
            bad = 0
            number += 1


def _augmented(transform: Transform, image: Image.Image, seed: int) -> Tensor:
    """The transform with random numbers of its own: every sample's, whatever was read before."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        return transform(image)
    finally:
        generator.set_state(state)


def collate(
    samples: Sequence[Sample], tokenizer: PackingTokenize, prompt: str, skipped: dict[str, int]
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
        most=int(counts.max()),
        packed=tokenizer.pack(captions, distinct),
        keys=tuple(sample.key for sample in samples),
        skipped=skipped,
    )


def phrase_entry(captions: Sequence[str], phrases: PhraseFinder) -> dict[str, Any]:
    """What a sample's JSON gets under "phrases"."""
    return {
        "rule": RULE,
        "tagger": phrases.tagger.name,
        "max_phrases": phrases.max_phrases,
        "found": {caption: phrases(caption) for caption in captions},
    }


def caption_phrases(record: Mapping[str, Any], caption: str, find: PhraseFinder) -> list[str]:
    """Phrases of a caption: from its sample's JSON if they were made the same way, else found now.

    Phrases made with a higher `max_phrases` serve too: the first ones are the same.
    """
    entry = record.get(KEY)
    if isinstance(entry, Mapping):
        same = entry.get("rule") == RULE and entry.get("tagger") == find.tagger.name
        stored, found = entry.get("max_phrases"), entry.get("found")
        enough = isinstance(stored, int) and stored >= find.max_phrases
        phrases = found.get(caption) if isinstance(found, Mapping) else None
        if same and enough and isinstance(phrases, list) and all(map(_is_phrase, phrases)):
            return phrases[: find.max_phrases]
    return find(caption)


def _is_phrase(entry: object) -> bool:
    """Words of a caption, in characters that every tokenizer knows."""
    return isinstance(entry, str) and 0 < len(entry) <= MOST_CHARACTERS and entry.isprintable()


def sample_counts(urls: Sequence[str]) -> list[int]:
    """Samples per shard, in order; a shard that cannot be read has as many as can be read.

    Counts come from `sizes.json` next to the shard; local shards are counted where it is missing or
    about a file of another size.

    Raises:
        ValueError: An address without a `sizes.json` next to it, or one that does not name it.
    """
    return [_count(url) for url in urls]


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
        size = local_path(url).stat().st_size if is_local(url) else -1
        sizes[name] = {"samples": len(sample_keys(url)), "bytes": size}
    return sizes


def fingerprint(urls: Sequence[str]) -> str:
    """16 hex digits over names and, for local shards, sizes in bytes."""
    lines = [
        f"{shard_name(url)} {local_path(url).stat().st_size if is_local(url) else ''}"
        for url in urls
    ]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _count(url: str) -> int:
    if is_local(url):
        path = local_path(url)
        status, listed = path.stat(), path.parent / SIZES
        if listed.is_file():
            entry = _read_sizes(str(listed), listed.stat().st_mtime_ns).get(path.name)
            if entry is not None and entry["bytes"] == status.st_size:
                return entry["samples"]
        return _count_anew(str(path), status.st_size, status.st_mtime_ns)
    name, sizes = shard_name(url), url.partition("?")[0].rpartition("/")[0] + f"/{SIZES}"
    if name not in _read_sizes(sizes):
        raise ValueError(
            f"{printable(sizes)} does not list {name}; write it anew with `data count out=`"
        )
    return _read_sizes(sizes)[name]["samples"]


@cache
def _count_anew(path: str, *version: int) -> int:
    return len(sample_keys(path))


@cache
def _read_sizes(url: str, *version: int) -> dict[str, dict[str, int]]:
    try:
        with open_shard(url) as stream:
            content = json.loads(stream.read())
        return {
            name: {"samples": int(entry["samples"]), "bytes": int(entry["bytes"])}
            for name, entry in content.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "without resampling the number of samples of each shard must be known, and "
            f"{printable(url)} cannot be read ({error}); write it with `data count out=`, or set "
            "resampled=true"
        ) from error
