"""What an evaluator of images and captions asks of its data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from gradeclip_ft.batch import PairBatch
from gradeclip_ft.evaluators.base import Opened, Source, Track, evaluating, untracked
from gradeclip_ft.evaluators.embed import encode_images, encode_texts
from gradeclip_ft.metrics import recall, require_finite, search
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.tokenizer import Tokenizer
from gradeclip_ft.results.record import Json, Measured, data_fingerprint


@runtime_checkable
class PairBatches(Protocol):
    """Batches of pairs with a known number."""

    def __iter__(self) -> Iterator[PairBatch]: ...

    def __len__(self) -> int: ...


@runtime_checkable
class OpenedPairs(Opened, Protocol):
    """Images and captions as one model wants them."""

    def batches(self, batch_size: int, workers: int) -> PairBatches:
        """All pairs once."""
        ...


@runtime_checkable
class PairSource(Source, Protocol):
    """Where pairs come from; called with the model's own preprocessing and tokenizer."""

    def __call__(
        self, *, transform: Callable[[Image.Image], Tensor], tokenizer: Tokenizer
    ) -> OpenedPairs:
        """The pairs of one model."""
        ...


TOPK = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalEvaluator:
    """Recall at 1, 5 and 10, text to image and image to text.

    Attributes:
        name: Of the result file; names the split.
        data: Where pairs come from.
        batch_size: Images per forward pass; does not change the numbers.
        text_batch_size: Captions per forward pass; does not change the numbers.
        workers: Processes that load images; 0 loads them here.
    """

    name: str
    data: PairSource
    batch_size: int = 64
    text_batch_size: int = 256
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        return {
            "task": "retrieval",
            "recall": "at least one right answer among the first k, first index wins ties",
            "image": "the model's own preprocessing",
            "text": "plain caption, no prompt",
            **self.data.protocol,
        }

    def prepare(self) -> None:
        """Make or check the data."""
        self.data.prepare()

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model.

        Raises:
            FileNotFoundError: Data are missing.
            ValueError: The data are damaged, or the embeddings are not finite.
        """
        pairs = self.data(transform=loaded.transform(train=False), tokenizer=loaded.tokenizer)
        batches = pairs.batches(self.batch_size, self.workers)
        with evaluating(loaded.clip):
            shown = track(batches, f"{self.name}: images", len(batches))
            images, tokens, owner = encode_images(loaded, shown)
            texts = encode_texts(loaded, tokens, self.text_batch_size, track, self.name)
        number = torch.arange(len(images), device=images.device)
        owner = owner.to(images.device)
        found = {
            "image_retrieval": search(texts, images, owner, number),
            "text_retrieval": search(images, texts, number, owner),
        }
        height, width = loaded.image_size
        return Measured(
            metrics={
                f"{way}_recall@{k}": value
                for way, (ranks, _) in found.items()
                for k, value in recall(ranks, TOPK).items()
            },
            protocol={
                **self.protocol,
                "image_size": height if height == width else [height, width],
                "context_length": loaded.tokenizer.context_length,
            },
            data=data_fingerprint(pairs.files, pairs.listed, pairs.counts),
            details={
                "share_of_ties": {
                    way: float(ties.double().mean()) for way, (_, ties) in found.items()
                },
                "images_by_number_of_captions": {
                    str(count): int(images_with)
                    for count, images_with in enumerate(torch.bincount(torch.bincount(owner)))
                    if images_with
                },
            },
        )


@runtime_checkable
class ChoiceSource(Source, Protocol):
    """Images with captions in twos, the right one first."""

    def __call__(
        self, *, transform: Callable[[Image.Image], Tensor], tokenizer: Tokenizer
    ) -> tuple[OpenedPairs, Sequence[str]]:
        """The captions of one model, and the kind of each two in their order."""
        ...


@dataclass(frozen=True)
class ChoiceEvaluator:
    """Share of images whose right caption is nearer than the wrong one, by kind.

    Attributes:
        name: Of the result file.
        data: Where the captions come from.
        batch_size: Images per forward pass; does not change the numbers.
        text_batch_size: Captions per forward pass; does not change the numbers.
        workers: Processes that load images; 0 loads them here.
    """

    name: str
    data: ChoiceSource
    batch_size: int = 64
    text_batch_size: int = 256
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        return {
            "task": "choice of two captions",
            "right": "cosine above that of the wrong caption; equal counts as wrong",
            "image": "the model's own preprocessing",
            "text": "plain caption, no prompt",
            **self.data.protocol,
        }

    def prepare(self) -> None:
        """Check the data."""
        self.data.prepare()

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model.

        Raises:
            FileNotFoundError: Data are missing.
            ValueError: The data are damaged, or the embeddings are not finite.
        """
        pairs, kinds = self.data(
            transform=loaded.transform(train=False), tokenizer=loaded.tokenizer
        )
        batches = pairs.batches(self.batch_size, self.workers)
        with evaluating(loaded.clip):
            shown = track(batches, f"{self.name}: images", len(batches))
            images, tokens, owner = encode_images(loaded, shown)
            texts = encode_texts(loaded, tokens, self.text_batch_size, track, self.name)
        scores = (images[owner.to(images.device)] * texts).sum(1).view(-1, 2).cpu()
        require_finite(scores)
        right = (scores[:, 0] > scores[:, 1]).tolist()
        asked = Counter(kinds)
        answered = Counter(kind for kind, hit in zip(kinds, right, strict=True) if hit)
        by_kind = {kind: answered[kind] / asked[kind] for kind in sorted(asked)}
        return Measured(
            metrics={"mean": fmean(by_kind.values()), **by_kind},
            protocol={
                **self.protocol,
                "image_size": list(loaded.image_size),
                "context_length": loaded.tokenizer.context_length,
            },
            data=data_fingerprint(pairs.files, pairs.listed, pairs.counts),
            details={
                "asked": dict(sorted(asked.items())),
                "share_of_ties": float((scores[:, 0] == scores[:, 1]).double().mean()),
            },
        )
