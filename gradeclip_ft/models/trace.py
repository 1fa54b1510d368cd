"""The last layer of one forward pass, computed once and read by everybody (Grad-ECLIP, eqs. 2-7).

All blocks but the last run natively. Of the last one, q, k and v are computed once; everything
behind attention is one row-wise function `finish(x, o)`. Three calls of it replace three forward
passes: the native embedding, the score that Grad-ECLIP differentiates, and the dense features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradeclip_ft.ops.attention import attend_row
from gradeclip_ft.ops.similarity import Score, cosine

Heads: TypeAlias = Literal["one", "all"]
Scale: TypeAlias = Literal["width", "head"]
Rows: TypeAlias = Callable[[Tensor], Tensor]
Finish: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Attend: TypeAlias = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Trace:
    """Input, queries, keys and values of the last attention layer, and what follows it.

    Attributes:
        tokens: Input of the last layer.
        query: Row whose output becomes the embedding: the class token, or the end of the text. None
            where the query is learned (attention pools); `finish` then reads o alone.
        q: Query of that row, heads joined.
        k: Keys, heads joined, positions applied.
        v: Values, heads joined.
        o: Attention output of the query row with the model's own heads, before any norm or
            projection.
        embedding: `finish(tokens[query], o)`, equal to the library's own embedding; not normalised.
        heads: The model's own number of heads.
        mask: Added to the scores of the query row; None where it sees every token.
        explained: Tokens that a map speaks of: patches, or words.
        grid: (h, w) of the patches; None for texts.
        finish: (x, o) -> embedding, row by row: everything behind attention.
        attend: (tokens, query) -> (q of the query, k, v): everything before attention.
        project: Output projection of the attention layer, on rows of the width of o.
        score: What is explained, from embedding and target; the cosine S of eq. 1 for a CLIP.
    """

    tokens: Float[Tensor, "B N W"]
    query: Int[Tensor, " B"] | None
    q: Float[Tensor, "B C"]
    k: Float[Tensor, "B N C"]
    v: Float[Tensor, "B N C"]
    o: Float[Tensor, "B C"]
    embedding: Float[Tensor, "B D"]
    heads: int
    mask: Float[Tensor, "B N"] | None
    explained: Bool[Tensor, "B N"]
    grid: tuple[int, int] | None
    finish: Finish
    attend: Attend
    project: Rows
    score: Score = cosine

    @property
    def query_tokens(self) -> Float[Tensor, "B W"]:
        """Input row of the query."""
        return query_rows(self.tokens, self.query)

    def output(self, heads: Heads, scale: Scale = "width") -> Float[Tensor, "B C"]:
        """Attention output o of the query row, with one head over all channels (eq. 7) or all.

        Args:
            heads: How many.
            scale: Of one head's q·k: C^-0.5, or that of the model's own heads, as the authors'
                notebook for BLIP keeps it.
        """
        if heads == "all":
            return self.o
        factor = None if scale == "width" else (self.q.shape[-1] / self.heads) ** -0.5
        return attend_row(self.q, self.k, self.v, heads=1, mask=self.mask, scale=factor)

    def dense(self) -> Float[Tensor, "B h w D"]:
        """Dense features F_d: the last layer without attention, each patch with its own value.

        The construction of CLIPSelf, which Grad-ECLIP's section 5 follows; not normalised.

        Raises:
            ValueError: The trace is that of a text.
        """
        if self.grid is None:
            raise ValueError("dense features exist for images; this is the trace of a text")
        height, width = self.grid
        first = self.tokens.shape[1] - height * width
        return self.finish(self.tokens[:, first:], self.v[:, first:]).view(
            -1, height, width, self.embedding.shape[-1]
        )

    def replay(
        self, tokens: Float[Tensor, "R N W"], owner: Int[Tensor, " R"]
    ) -> Float[Tensor, "R D"]:
        """Embeddings from other inputs of the last layer, with the model's own heads.

        Args:
            tokens: Inputs of the last layer.
            owner: Row of this trace whose query position and mask each of them takes.
        """
        query = None if self.query is None else self.query[owner]
        q, k, v = self.attend(tokens, query)
        mask = None if self.mask is None else self.mask[owner]
        o = attend_row(q, k, v, heads=self.heads, mask=mask)
        return self.finish(query_rows(tokens, query), o)

    def detach(self) -> Trace:
        """The same trace without a graph."""
        return self._map(Tensor.detach)

    def float(self) -> Trace:
        """The same trace in single precision."""
        return self._map(lambda tensor: tensor.float())

    def _map(self, function: Rows) -> Trace:
        return replace(
            self,
            tokens=function(self.tokens),
            q=function(self.q),
            k=function(self.k),
            v=function(self.v),
            o=function(self.o),
            embedding=function(self.embedding),
        )


def trace_layer(
    tokens: Float[Tensor, "B N W"],
    query: Int[Tensor, " B"] | None,
    *,
    attend: Attend,
    finish: Finish,
    project: Rows,
    heads: int,
    explained: Bool[Tensor, "B N"],
    grid: tuple[int, int] | None = None,
    mask: Float[Tensor, "B N"] | None = None,
    score: Score = cosine,
) -> Trace:
    """The trace of a last layer from its input; see `Trace` for the arguments."""
    q, k, v = attend(tokens, query)
    o = attend_row(q, k, v, heads=heads, mask=mask)
    return Trace(
        tokens=tokens,
        query=query,
        q=q,
        k=k,
        v=v,
        o=o,
        embedding=finish(query_rows(tokens, query), o),
        heads=heads,
        mask=mask,
        explained=explained,
        grid=grid,
        finish=finish,
        attend=attend,
        project=project,
        score=score,
    )


def class_token_query(
    tokens: Float[Tensor, "B N W"], grid: tuple[int, int]
) -> tuple[Int[Tensor, " B"], Bool[Tensor, "B N"]]:
    """Query row and explained tokens of an image tower whose first token is the class token."""
    return tokens.new_zeros(len(tokens), dtype=torch.long), patch_tokens(tokens, grid)


def patch_tokens(tokens: Float[Tensor, "B N W"], grid: tuple[int, int]) -> Bool[Tensor, "B N"]:
    """The patches among the tokens: the last h·w, behind class token and registers."""
    batch, count, _ = tokens.shape
    position = torch.arange(count, device=tokens.device)
    return (position >= count - grid[0] * grid[1]).expand(batch, count)


def query_rows(
    tokens: Float[Tensor, "B N W"], query: Int[Tensor, " B"] | None
) -> Float[Tensor, "B W"]:
    """One row of every sequence: the query's; the first where the query is none of them."""
    if query is None:
        return tokens[:, 0]
    return tokens[torch.arange(len(tokens), device=tokens.device), query]
