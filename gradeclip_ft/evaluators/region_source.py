"""What a region evaluator asks of its data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from gradeclip_ft.batch import RegionBatch
from gradeclip_ft.evaluators.source import Opened, Source


@runtime_checkable
class RegionBatches(Protocol):
    """Batches of regions with a known number."""

    def __iter__(self) -> Iterator[RegionBatch]: ...

    def __len__(self) -> int: ...


@runtime_checkable
class OpenedRegions(Opened, Protocol):
    """Regions at one image size."""

    @property
    def names(self) -> Sequence[str]:
        """Class names in order of the labels."""
        ...

    def batches(self, batch_size: int, workers: int) -> RegionBatches:
        """All regions once."""
        ...


@runtime_checkable
class RegionSource(Source, Protocol):
    """Where regions come from; called with the evaluator's image size and the model's pixels."""

    def __call__(
        self,
        *,
        image_size: int,
        patch: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        crop_size: int | None = None,
    ) -> OpenedRegions:
        """The regions at one image size, and crops of them where a size is given."""
        ...
