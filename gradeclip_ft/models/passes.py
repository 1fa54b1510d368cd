"""One forward pass of a tower, open between any two of its layers.

A tower's adapter says how its layers come apart, and nothing else: the trace of the last layer, the
record of several, and a pass that is entered in the middle all follow from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradeclip_ft.models.trace import Finish, Rows, Trace, query_rows, trace_layer
from gradeclip_ft.ops.similarity import Score, cosine

Pick: TypeAlias = Callable[[Tensor], Tensor]
"""Which rows need a query: (B, N, ...) to those of one row, or of all."""


@dataclass(frozen=True)
class Layer:
    """One attention layer, taken apart.

    Attributes:
        attend: (tokens, pick) -> (q of the picked rows, k, v), heads joined, positions applied.
        finish: (x, o) -> rows behind the layer, from its input rows and their attention output.
        add: o -> what attention adds to its input rows; for a pool, what comes out of it.
        project: The output projection alone.
        heads: Attention heads.
        run: (tokens, mask) -> tokens, by the library's own code; None for a pool.
    """

    attend: Callable[[Tensor, Pick], tuple[Tensor, Tensor, Tensor]]
    finish: Finish
    add: Rows
    project: Rows
    heads: int
    run: Callable[[Tensor, Tensor | None], Tensor] | None


@dataclass(frozen=True)
class Pass:
    """A forward pass before its first layer.

    Attributes:
        tokens: Input of the first layer.
        layers: First to last; the last one is the explained one.
        head: Rows behind the last layer to embeddings.
        query: Row that becomes the embedding; None where the query is learned (attention pools).
        explained: Tokens that a map speaks of: patches, or words.
        grid: (h, w) of the patches; None for texts.
        mask: Added to the attention scores: (N, N), (B, N, N), or None.
        checkpointed: Compute activations of all layers but the last again in the backward pass.
        score: What is explained, from embedding and target.
    """

    tokens: Float[Tensor, "B N W"]
    layers: tuple[Layer, ...]
    head: Rows
    query: Int[Tensor, " B"] | None
    explained: Bool[Tensor, "B N"]
    grid: tuple[int, int] | None = None
    mask: Tensor | None = None
    checkpointed: bool = False
    score: Score = cosine

    @property
    def is_pooled(self) -> bool:
        """Whether the last layer is an attention pool behind ordinary blocks."""
        return self.layers[-1].run is None

    def rows(self, owner: Int[Tensor, " P"]) -> Pass:
        """The same pass with its inputs repeated or reordered."""
        return replace(
            self,
            tokens=self.tokens[owner],
            query=None if self.query is None else self.query[owner],
            explained=self.explained[owner],
            mask=self.mask if self.mask is None or self.mask.ndim == 2 else self.mask[owner],
        )

    def run(self, tokens: Float[Tensor, "B N W"], start: int, stop: int) -> Float[Tensor, "B N W"]:
        """Layers `start` to `stop`, without the latter, by the library's own code."""
        for layer in self.layers[start:stop]:
            assert layer.run is not None, "a pool cannot be run as a block"
            if self.checkpointed and torch.is_grad_enabled():
                tokens = checkpoint(layer.run, tokens, self.mask, use_reentrant=False)
            else:
                tokens = layer.run(tokens, self.mask)
        return tokens

    def embed(self, tokens: Float[Tensor, "B N W"], start: int) -> Float[Tensor, "B D"]:
        """Embeddings of a pass that is entered before layer `start`."""
        return self._trace(self.run(tokens, start, len(self.layers) - 1)).embedding

    def trace(self) -> Trace:
        """The last layer of this pass."""
        return self._trace(self.run(self.tokens, 0, len(self.layers) - 1))

    def _trace(self, tokens: Tensor) -> Trace:
        last, head = self.layers[-1], self.head

        def attend(rows: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            return last.attend(rows, lambda y: query_rows(y, query))

        def finish(x: Tensor, o: Tensor) -> Tensor:
            return head(last.finish(x, o))

        return trace_layer(
            tokens,
            self.query,
            attend=attend,
            finish=finish,
            project=last.project,
            heads=last.heads,
            explained=self.explained,
            grid=self.grid,
            mask=self._query_mask(),
            score=self.score,
        )

    def _query_mask(self) -> Float[Tensor, "B N"] | None:
        if self.mask is None or self.query is None:
            return None
        if self.mask.ndim == 2:
            return self.mask[self.query]
        return self.mask[torch.arange(len(self.query), device=self.query.device), self.query]
