"""MaskCLIP: similarity of the dense features and the text (Zhou et al., 2022); no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradeclip_ft.models.trace import Trace, UnsupportedTowerError, query_rows
from gradeclip_ft.ops.heatmap import owned_products
from gradeclip_ft.ops.similarity import unit


@dataclass(frozen=True)
class MaskClip:
    """H_i = cos(F_d,i, F_T), its positive part, so that it can weigh dense features.

    Attributes:
        key_factor: Multiply by the cosine of the projected query-row key and patch key, as the
            Grad-ECLIP authors' script does.
        create_graph: Let gradients flow through the map.
    """

    key_factor: bool = False
    create_graph: bool = False

    compares_texts: ClassVar[bool] = True

    def from_trace(
        self, trace: Trace, target: Float[Tensor, "P D"], owner: Int[Tensor, " P"]
    ) -> Float[Tensor, "P N"]:
        """Relevance of every token for each target."""
        features = unit(trace.finish(trace.tokens, trace.v))  # (B, N, D)
        relevance = owned_products(features, target, owner)
        if self.key_factor:
            relevance = relevance * _key_factor(trace)[owner]
        return relevance.masked_fill(~trace.explained[owner], 0.0).relu()


def _key_factor(trace: Trace) -> Float[Tensor, "B N"]:
    if trace.query is None:
        raise UnsupportedTowerError(
            "key_factor compares with the key of the query token, but this tower's query is "
            "learned and has none; set key_factor to false"
        )
    keys = unit(trace.project(trace.k))
    return torch.bmm(keys, query_rows(keys, trace.query).unsqueeze(2)).squeeze(2)
