"""What an evaluator of images and captions asks of its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor

from gradeclip_ft.batch import PairBatch
from gradeclip_ft.models.tokenizer import Tokenizer


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
