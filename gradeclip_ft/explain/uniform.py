"""The same weight everywhere: what a local loss gains without any explanation."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from gradeclip_ft.models.trace import Trace


@dataclass(frozen=True)
class Uniform:
    """H_i = 1/n over the n explained tokens, so that its sum is 1 at any grid.

    Attributes:
        create_graph: Without meaning here; the map depends on nothing.
    """

    create_graph: bool = False

    def from_trace(
        self, trace: Trace, target: Float[Tensor, "P D"], owner: Int[Tensor, " P"]
    ) -> Float[Tensor, "P N"]:
        """Relevance of every token for each target."""
        inside = trace.explained[owner].to(trace.tokens.dtype)
        return inside / inside.sum(1, keepdim=True).clamp(min=1)
