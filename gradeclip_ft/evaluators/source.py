"""What every evaluator asks of its data, whatever they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Opened(Protocol):
    """Data of one evaluation, for its fingerprint."""

    @property
    def files(self) -> Sequence[Path]:
        """Small files, read for the fingerprint."""
        ...

    @property
    def listed(self) -> Sequence[Path]:
        """Images, masks or shards, listed in the fingerprint."""
        ...

    @property
    def counts(self) -> Mapping[str, Any]:
        """What counts, and what was skipped by cause."""
        ...


@runtime_checkable
class Source(Protocol):
    """Where data come from; called for one model."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """Choices that change the numbers."""
        ...

    def prepare(self) -> None:
        """Make or check the data."""
        ...
