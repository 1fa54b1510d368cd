"""Caption data for training: shards in CC3M's layout to batches (section 5.2 of the paper).

`CaptionShards` is the settings, `prepare` runs once before workers start, `loader` gives one
epoch of one process. Everything is a function of (seed, epoch, rank, world size, workers): there
is no state to save, and an interrupted epoch goes on with `start`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.data.caption_batches import Batches, Tokenize, Transform
from gradeclip_ft.data.order import Place, once, resampled, slice_of
from gradeclip_ft.data.processes import in_foreign_worker
from gradeclip_ft.data.samples import CaptionChoice
from gradeclip_ft.data.sizes import fingerprint, sample_counts
from gradeclip_ft.data.stream import RawSample, Skips, expand_shards
from gradeclip_ft.ops.stop_signals import heed_parent_alone
from gradeclip_ft.text.prompts import phrase_prompt
from gradeclip_ft.text.taggers import TaggerKind, prepare_tagger

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
        return once(epoch.urls, epoch.counts, part, place, shuffle=source.shuffle, skips=skips)
