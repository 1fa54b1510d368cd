"""What an evaluator of images and captions asks of its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from PIL import Image
from torch import Tensor

from gradeclip_ft.batch import PairBatch
from gradeclip_ft.evaluators.source import Opened, Source
from gradeclip_ft.models.tokenizer import Tokenizer


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
