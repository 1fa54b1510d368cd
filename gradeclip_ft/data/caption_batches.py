"""What a loader worker does: raw samples to finished `CaptionBatch`es.

Phrases are found here, made distinct over the batch and tokenised in their prompt. A worker's
batches depend on its `Place` alone. Beginning at a later batch, it reads the samples before and
drops those that cannot be used, so every later batch is the one an uninterrupted epoch gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from gradeclip_ft.batch import CaptionBatch, PackedTexts
from gradeclip_ft.data.order import Place
from gradeclip_ft.data.phrase_index import KEY, stored_phrases
from gradeclip_ft.data.samples import (
    CaptionChoice,
    read_caption,
    read_image,
    read_record,
    sample_name,
)
from gradeclip_ft.data.stream import BadSampleError, RawSample, Skips, stable_hash
from gradeclip_ft.text.phrases import Phrases
from gradeclip_ft.text.prompts import phrase_prompt
from gradeclip_ft.text.taggers import load_tagger

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
        read_image(raw, only_check=True)

    def _read(self, raw: RawSample, key: int, phrases: Phrases | None) -> Sample:
        record = self._record(raw)
        caption = read_caption(raw, record, self.caption, key)
        image = read_image(raw)
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
