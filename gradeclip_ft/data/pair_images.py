"""Opened pairs: one image with its captions per item, as one model wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradeclip_ft.batch import PairBatch
from gradeclip_ft.data.processes import once


@runtime_checkable
class Tokenize(Protocol):
    """Texts to token ids."""

    def __call__(self, texts: Sequence[str], *, trim: bool = False) -> Int[Tensor, "M L"]:
        """Ids of some texts, with `trim` no longer than needed."""
        ...


@dataclass(frozen=True)
class CaptionedImages(Dataset[tuple[Tensor, tuple[str, ...]]]):
    """Opened pairs: one image with its captions per item.

    Attributes:
        names: Of the images, which say which photo it is.
        captions: Of each image, in file order.
        read: Image number to its picture.
        files: Annotation files, which a fingerprint reads.
        listed: Images or shards, which a fingerprint lists.
        skipped: Left out, by cause.
        transform: The model's own preprocessing.
        tokenizer: Texts to token ids.
    """

    names: Sequence[str]
    captions: Sequence[tuple[str, ...]]
    read: Callable[[int], Image.Image]
    files: Sequence[Path]
    listed: Sequence[Path]
    skipped: dict[str, int]
    transform: Callable[[Image.Image], Tensor]
    tokenizer: Tokenize

    @property
    def counts(self) -> dict[str, Any]:
        """Images and captions that count, and those left out."""
        return {
            "images": len(self.captions),
            "captions": sum(map(len, self.captions)),
            "skipped": self.skipped,
        }

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 H W"], tuple[str, ...]]:
        """Image and captions number `index`.

        Raises:
            ValueError: The image cannot be read.
        """
        return self.transform(self.read(index)), self.captions[index]

    def join(self, samples: Sequence[tuple[Tensor, tuple[str, ...]]]) -> PairBatch:
        """Images of one batch with their captions flat."""
        captions = [captions for _, captions in samples]
        counts = torch.tensor([len(some) for some in captions])
        return PairBatch(
            images=torch.stack([image for image, _ in samples]),
            texts=self.tokenizer([text for some in captions for text in some], trim=True),
            owner=torch.arange(len(samples)).repeat_interleave(counts),
        )

    def batches(self, batch_size: int, workers: int) -> DataLoader[PairBatch]:
        """All pairs once, in file order; leaves torch's global random state alone."""
        return once(self, self.join, batch_size=batch_size, workers=workers)
