"""Attention rollout (Abnar and Zuidema, 2020): attention multiplied through the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.trace import Heads, Record


@dataclass(frozen=True)
class Rollout:
    """H = row of the query in the product of rownorm(mean over heads of A + I), last layer first.

    Knows no text.

    Attributes:
        layers: All, or the last alone, to which a default of the authors' script reduces it.
    """

    layers: Literal["all", "last"] = "all"
    heads: Heads = "all"

    @property
    def depth(self) -> int | None:
        """Layers that are recorded."""
        return None if self.layers == "all" else 1

    def from_record(self, record: Record, target: Float[Tensor, "P D"]) -> Float[Tensor, "P N"]:
        """Relevance of every token."""
        joined: Tensor | None = None
        for layer in record.layers:
            weights = layer.attention.detach().mean(1)
            identity = torch.eye(weights.shape[-1], device=weights.device, dtype=weights.dtype)
            mixed = weights + identity
            mixed = mixed / mixed.sum(-1, keepdim=True)
            joined = mixed if joined is None else mixed @ joined
        assert joined is not None
        return record.of_query(joined)
