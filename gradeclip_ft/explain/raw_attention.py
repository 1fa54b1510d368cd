"""Raw attention: how much the query looks at each token in the last layer. Knows no text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradeclip_ft.models.trace import Heads, Trace


@dataclass(frozen=True)
class RawAttention:
    """H_i = mean over heads of A[query, i], of the explained layer.

    Attributes:
        heads: The mean over the model's own, or one head over all channels (the authors' script).
        create_graph: Let gradients flow through the map.
    """

    heads: Heads = "all"
    create_graph: bool = False

    def from_trace(
        self, trace: Trace, target: Float[Tensor, "P D"], owner: Int[Tensor, " P"]
    ) -> Float[Tensor, "P N"]:
        """Relevance of every token, the same for each target of an input."""
        heads = trace.heads if self.heads == "all" else 1
        batch, tokens, width = trace.k.shape
        q = trace.q.reshape(batch, heads, width // heads)
        k = trace.k.reshape(batch, tokens, heads, width // heads)
        scores = torch.einsum("bac,bnac->ban", q, k) / (width // heads) ** 0.5
        if trace.mask is not None:
            scores = scores + trace.mask.unsqueeze(1)
        weights: Tensor = scores.softmax(-1).mean(1)  # (B, N)
        return weights.masked_fill(~trace.explained, 0.0)[owner]
