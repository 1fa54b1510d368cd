"""MaskCLIP: similarity of the dense features and the text (Zhou et al., 2022); no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from gradeclip_ft.models.trace import Trace
from gradeclip_ft.ops.attention import DensePath
from gradeclip_ft.ops.heatmap import owned_products
from gradeclip_ft.ops.similarity import unit


@dataclass(frozen=True)
class MaskClip:
    """H_i = cos(F_d,i, F_T), its positive part, so that it can weigh dense features.

    Attributes:
        create_graph: Let gradients flow through the map.
        dense: How the last layer makes F_d; MaskCLIP's own is the value path.
    """

    create_graph: bool = False
    dense: DensePath = "value"

    compares_texts: ClassVar[bool] = True

    def from_trace(
        self, trace: Trace, target: Float[Tensor, "P D"], owner: Int[Tensor, " P"]
    ) -> Float[Tensor, "P N"]:
        """Relevance of every token for each target."""
        features = unit(trace.rows(self.dense))  # (B, N, D)
        relevance = owned_products(features, target, owner, most=trace.most)
        return relevance.masked_fill(~trace.explained[owner], 0.0).relu()
