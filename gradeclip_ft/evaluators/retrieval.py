"""Retrieval between images and captions, recall@k both ways (Grad-ECLIP, Table 9).

`image_retrieval_recall@k` is text to image, `text_retrieval_recall@k` image to text, as in
LAION's CLIP_benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from gradeclip_ft.batch import PairBatch
from gradeclip_ft.evaluators.base import Track, evaluating, placement, untracked
from gradeclip_ft.metrics.retrieval import recall, search
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.tokenizer import Tokenizer
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.results.fingerprint import data_fingerprint
from gradeclip_ft.results.record import Json, Measured

TOPK = (1, 5, 10)


@runtime_checkable
class PairBatches(Protocol):
    """Batches of pairs with a known number."""

    def __iter__(self) -> Iterator[PairBatch]: ...

    def __len__(self) -> int: ...


@runtime_checkable
class OpenedPairs(Protocol):
    """Images and captions as one model wants them."""

    @property
    def files(self) -> Sequence[Path]:
        """Annotation files."""
        ...

    @property
    def listed(self) -> Sequence[Path]:
        """Images."""
        ...

    @property
    def counts(self) -> Mapping[str, Any]:
        """Images and captions that count, and what was skipped by cause."""
        ...

    def batches(self, batch_size: int, workers: int) -> PairBatches:
        """All pairs once."""
        ...


@runtime_checkable
class PairSource(Protocol):
    """Where pairs come from; called with the model's own preprocessing and tokenizer."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """Choices that change the numbers."""
        ...

    def prepare(self) -> None:
        """Make or check the data."""
        ...

    def __call__(
        self, *, transform: Callable[[Image.Image], Tensor], tokenizer: Tokenizer
    ) -> OpenedPairs:
        """The pairs of one model."""
        ...


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
            images, tokens, owner = _encode_images(loaded, shown)
            texts = _encode_texts(loaded, tokens, self.text_batch_size, track, self.name)
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


def _encode_images(
    loaded: LoadedClip, batches: Iterable[PairBatch]
) -> tuple[Float[Tensor, "B D"], list[Int[Tensor, "M L"]], Int[Tensor, " T"]]:
    """Unit image embeddings, the token ids of each batch, and the image number of each caption."""
    device, dtype = placement(loaded.clip)
    images, tokens, owners, seen = [], [], [], 0
    for batch in batches:
        images.append(unit(loaded.clip.image.encode(batch.images.to(device, dtype))))
        tokens.append(batch.texts)
        owners.append(batch.owner + seen)
        seen += len(batch.images)
    return torch.cat(images), tokens, torch.cat(owners)


def _encode_texts(
    loaded: LoadedClip, tokens: Sequence[Tensor], size: int, track: Track, name: str
) -> Tensor:
    """Unit embeddings of all captions (T, D); equal captions are encoded once: they tie exactly.

    Sorted by length and cut behind the longest of a batch, where that is exact.
    """
    device, _ = placement(loaded.clip)
    width = max(ids.shape[1] for ids in tokens)
    pad = loaded.tokenizer.pad
    ids = torch.cat(
        [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=pad) for part in tokens]
    )
    distinct, row = torch.unique(ids, dim=0, return_inverse=True)
    length = loaded.tokenizer.lengths(distinct)
    order = length.argsort(stable=True)
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    embedded: Tensor | None = None
    for part in track(parts, f"{name}: captions", len(parts)):
        cut = int(length[part].max()) if loaded.tokenizer.exact_cut else width
        found = unit(loaded.clip.text.encode(distinct[part, :cut].to(device)))
        if embedded is None:
            embedded = found.new_empty(len(distinct), found.shape[1])
        embedded[part.to(device)] = found
    assert embedded is not None
    return embedded[row.to(device)]
