"""Image-text similarity map of the tokens themselves, plain and reversed (ICLIP, eqs. 1-5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.trace import Heads, Record
from gradeclip_ft.ops.heatmap import min_max
from gradeclip_ft.ops.similarity import unit


@dataclass(frozen=True)
class Itsm:
    """M_i = cos(x_i, F_T), x_i the tokens after the last layer, normed and projected.

    On a plain CLIP the map prefers the background, which is why its reverse, 1 - M, scores better.

    Attributes:
        reverse: 1 - M, of the map from 0 to 1.
        projections: Checkpoint of a run of ICLIP, whose φ'_i and φ'_t come before the cosine.
    """

    reverse: bool = False
    projections: str | None = None
    depth: int | None = 1
    heads: Heads = "all"

    compares_texts: ClassVar[bool] = True

    def from_record(self, record: Record, target: Float[Tensor, "P D"]) -> Float[Tensor, "P N"]:
        """Similarity of every token, from 0 to 1 over the explained ones."""
        rows = record.opened.head(record.tokens.detach())
        if self.projections is not None:
            of_images, of_texts = _read(self.projections)
            rows, target = rows @ of_images.to(rows), target @ of_texts.to(target)
        rows, target = unit(rows), unit(target)
        similarity = torch.bmm(rows, target.unsqueeze(2)).squeeze(2)
        scaled = min_max(similarity, record.explained)
        return 1 - scaled if self.reverse else scaled


@cache
def _read(checkpoint: str) -> tuple[Tensor, Tensor]:
    """φ'_i and φ'_t.

    Raises:
        ValueError: The run trained another objective.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    names = [f"objective.map_{side}.0" for side in ("image", "text")]
    if any(name not in state for name in names):
        raise ValueError(f"{checkpoint} is not of a run with objective=iclip; use explainer itsm")
    first, second = (state[name].clone() for name in names)
    return first, second
