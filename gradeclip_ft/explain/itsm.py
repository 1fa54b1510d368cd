"""Image-text similarity map of the tokens themselves, plain and reversed (ICLIP, eqs. 1-5)."""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    reverse: bool = False
    depth: int | None = 1
    heads: Heads = "all"

    compares_texts: ClassVar[bool] = True

    def from_record(self, record: Record, target: Float[Tensor, "P D"]) -> Float[Tensor, "P N"]:
        """Similarity of every token, from 0 to 1 over the explained ones."""
        rows = unit(record.opened.head(record.tokens.detach()))
        similarity = torch.bmm(rows, target.unsqueeze(2)).squeeze(2)
        scaled = min_max(similarity, record.explained)
        return 1 - scaled if self.reverse else scaled
