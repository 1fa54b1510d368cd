"""What a region evaluator asks of its data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gradeclip_ft.batch import RegionBatch


@runtime_checkable
class RegionBatches(Protocol):
    """Batches of regions with a known number."""

    def __iter__(self) -> Iterator[RegionBatch]: ...

    def __len__(self) -> int: ...


@runtime_checkable
class OpenedRegions(Protocol):
    """Regions at one image size."""

    @property
    def names(self) -> Sequence[str]:
        """Class names in order of the labels."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """Annotation files."""
        ...

    @property
    def listed(self) -> Sequence[Path]:
        """Images and masks."""
        ...

    @property
    def counts(self) -> Mapping[str, Any]:
        """Images, things and stuff that count, and what was skipped by cause."""
        ...

    def batches(self, batch_size: int, workers: int) -> RegionBatches:
        """All regions once."""
        ...


@runtime_checkable
class RegionSource(Protocol):
    """Where regions come from; called with the evaluator's image size and the model's pixels."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """Choices that change the numbers."""
        ...

    def prepare(self) -> None:
        """Make or check the data."""
        ...

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
