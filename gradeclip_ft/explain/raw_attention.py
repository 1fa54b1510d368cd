"""Raw attention: how much the query looks at each token in the last layer. Knows no text."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from gradeclip_ft.models.trace import Heads, Trace
from gradeclip_ft.ops.attention import row_weights


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
        weights = row_weights(trace.q, trace.k, heads=heads, mask=trace.mask).mean(1)  # (B, N)
        return weights.masked_fill(~trace.explained, 0.0)[owner]
