"""What an objective is: a batch in, loss terms out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.models.clip import Clip


@dataclass(frozen=True)
class LossTerms:
    """A loss and what is worth logging about it.

    Attributes:
        total: The scalar to minimise, with its graph.
        parts: Scalars without a graph, by the name they are logged under.
    """

    total: Float[Tensor, ""]
    parts: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """Loss of one batch; the whole of it runs inside the training step, so DDP sees one forward."""

    def check(self, clip: Clip) -> None:
        """Refuse a model that this objective cannot train; called before anything else.

        Raises:
            UnsupportedTowerError: A tower lacks what the loss needs.
        """
        ...

    def __call__(self, clip: Clip, batch: CaptionBatch) -> LossTerms:
        """Loss terms of this batch."""
        ...
