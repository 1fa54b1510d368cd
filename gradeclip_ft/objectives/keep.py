"""Guards: embeddings and the geometry of patches stay near those of a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.objectives.base import gram_distance
from gradeclip_ft.objectives.step import Step
from gradeclip_ft.ops.similarity import cosine


@dataclass(frozen=True)
class Keep:
    """Mean of 1 - cos between the embedding of an image and the teacher's of it.

    Attributes:
        weight: Factor in the total.
        text: Weight of the same for the captions; 0 leaves them out.
        teacher: The start model, or the moving average.
    """

    weight: float = 1.0
    text: float = 0.0
    teacher: Literal["start", "ema"] = "start"

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """The distance."""
        view = step.teacher(self.teacher)
        loss = (1 - cosine(step.embedding, view.embedding)).mean()
        if self.text:
            loss = loss + self.text * (1 - cosine(step.captions, view.captions)).mean()
        return loss


@dataclass(frozen=True)
class Gram:
    """Mean squared change of the cosines between the patches of an image (DenseRC, DeCLIP).

    Attributes:
        weight: Factor in the total.
        teacher: The start model, or the moving average.
    """

    weight: float = 0.1
    teacher: Literal["start", "ema"] = "start"

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """The distance."""
        now, anchor = step.dense, step.teacher(self.teacher).dense
        with step.single_precision():  # bf16 products would be as coarse as the differences
            return gram_distance(now, anchor)
