"""The last layer of one forward pass, computed once and read by everybody (Grad-ECLIP, eqs. 2-7).

All blocks but the last run natively. Of the last one, q, k and v are computed once; everything
after attention is one row-wise function `finish(x, o)`. Three calls of it replace three forward
passes: the native embedding, the score that Grad-ECLIP differentiates, and the dense features.

An adapter (`models/towers`) describes a forward pass as a `Pass`: its first tokens and its layers,
each taken apart into a `Layer`. `Pass.trace` gives the `Trace` of the last layer; `record_layers`
keeps several layers, for the methods that follow attention through the tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradeclip_ft.ops.attention import DensePath, attend, attend_alike, attend_row
from gradeclip_ft.ops.similarity import Score, cosine


class UnsupportedTowerError(ValueError):
    """The model has a part that the adapters do not reproduce exactly."""


Foreign: TypeAlias = Any
"""A module of open_clip or timm, whose attributes the adapters check by hand."""

Heads: TypeAlias = Literal["one", "all"]
Scale: TypeAlias = Literal["width", "head"]
Rows: TypeAlias = Callable[[Tensor], Tensor]
Finish: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Attend: TypeAlias = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
Pick: TypeAlias = Callable[[Tensor], Tensor]
"""Which rows need a query: (B, N, ...) to those of one row, or of all."""

ONE_LAYER = "grad_eclip, raw_attention, grad_cam, maskclip, rise or integrated_gradients"
"""Methods that need one layer alone, for error messages."""


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
        finish: (x, o) -> embedding, row by row: everything after attention.
        attend: (tokens, query) -> (q of the query, k, v): everything before attention.
        project: Output projection of the attention layer, on rows of the width of o.
        layer: The last layer itself, for what `attend` and `finish` do not give.
        head: Rows after the last layer to embeddings.
        score: What is explained, from embedding and target; the cosine S of eq. 1 for a CLIP.
        most: Targets of one input at most, where known; otherwise they are counted, and the host
            waits for the device.
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
    layer: Layer
    head: Rows
    score: Score = cosine
    most: int | None = None

    @property
    def query_tokens(self) -> Float[Tensor, "B W"]:
        """Input row of the query."""
        return query_rows(self.tokens, self.query)

    def output(self, heads: Heads, scale: Scale = "width") -> Float[Tensor, "B C"]:
        """Attention output o of the query row, with one head over all channels (eq. 7) or all.

        One head may keep the scale of the model's own, as the authors' notebook for BLIP does.
        """
        if heads == "all":
            return self.o
        # One head's scores sum over all C channels, so they are divided by sqrt(C); "head" keeps
        # the weaker sqrt(C / A) of the model's own A heads, which makes a sharper softmax.
        factor = None if scale == "width" else (self.q.shape[-1] / self.heads) ** -0.5
        return attend_row(self.q, self.k, self.v, heads=1, mask=self.mask, scale=factor)

    def dense(self, path: DensePath = "value") -> Float[Tensor, "B h w D"]:
        """Dense features F_d: the last layer with other attention, one for each patch.

        On the value path each patch has its own value alone, the construction of CLIPSelf, which
        Grad-ECLIP's section 5 follows; not normalised.

        Raises:
            UnsupportedTowerError: This tower has the value path alone.
            ValueError: The trace is that of a text.
        """
        if self.grid is None:
            raise ValueError("dense features exist for images; this is the trace of a text")
        height, width = self.grid
        # Patches are the last h·w tokens whatever comes before them: a class token, registers, a
        # ResNet's mean token, or nothing (SigLIP).
        first = self.tokens.shape[1] - height * width
        return self.rows(path, first).view(-1, height, width, self.embedding.shape[-1])

    def rows(self, path: DensePath = "value", first: int = 0) -> Float[Tensor, "B M D"]:
        """The features of `dense`, in the space of the embedding, of all tokens from `first` on."""
        x = self.tokens[:, first:]
        if path == "value":
            # A token that attends to itself alone has weight 1 on its own value: o_i = v_i. So the
            # same `finish` that made the embedding from (B, C) makes F_d from (B, h·w, C).
            return self.finish(x, self.v[:, first:])
        if self.layer.run is None:
            raise UnsupportedTowerError(
                f"dense={path} needs a block in which patches attend to each other, and this tower "
                "ends in an attention pool, whose query is not a patch; choose dense=value"
            )
        if self.grid is None:
            raise ValueError(f"dense={path} is for images; this is the trace of a text")
        q, k, v = self.layer.attend(self.tokens, lambda y: y)
        o = attend_alike(path, q, k, v, heads=self.heads, grid=self.grid)[:, first:]
        if path == "sclip":  # the rest of the block as it is
            return self.finish(x, o)
        # ClearCLIP and NACLIP drop residual and MLP, in which a few channels drown the others;
        # CLIP Surgery drops the MLP alone.
        added = self.layer.add(o)
        return self.head(x + added if path == "vv" else added)

    def replay(
        self, tokens: Float[Tensor, "R N W"], owner: Int[Tensor, " R"], heads: Heads = "all"
    ) -> Float[Tensor, "R D"]:
        """Embeddings from other inputs of the last layer.

        Each takes query position and mask from the row of this trace that owns it.
        """
        query = None if self.query is None else self.query[owner]
        q, k, v = self.attend(tokens, query)
        mask = None if self.mask is None else self.mask[owner]
        o = attend_row(q, k, v, heads=self.heads if heads == "all" else 1, mask=mask)
        return self.finish(query_rows(tokens, query), o)

    def detach(self) -> Trace:
        """The same trace without a graph."""
        return self._map(Tensor.detach)

    def float(self) -> Trace:
        """The same trace in single precision."""
        return self._map(lambda tensor: tensor.float())

    def _map(self, function: Rows) -> Trace:
        # mask, query and explained stay: they carry neither a graph nor digits to lose.
        names = ("tokens", "q", "k", "v", "o", "embedding")
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **changed)


def patch_tokens(tokens: Float[Tensor, "B N W"], grid: tuple[int, int]) -> Bool[Tensor, "B N"]:
    """The patches among the tokens: the last h·w, after class token and registers."""
    batch, count, _ = tokens.shape
    position = torch.arange(count, device=tokens.device)
    return (position >= count - grid[0] * grid[1]).expand(batch, count)


def query_rows(
    tokens: Float[Tensor, "B N W"], query: Int[Tensor, " B"] | None
) -> Float[Tensor, "B W"]:
    """One row of every sequence: the query's; the first where the query is none of them."""
    if query is None:
        # A pool's `finish` never reads this row; it only has to have the right shape.
        return tokens[:, 0]
    return tokens[torch.arange(len(tokens), device=tokens.device), query]


@dataclass(frozen=True)
class Layer:
    """One attention layer, taken apart.

    Attributes:
        attend: (tokens, pick) -> (q of the picked rows, k, v), heads joined, positions applied.
        finish: (x, o) -> rows after the layer, from its input rows and their attention output.
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
        head: Rows after the last layer to embeddings.
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
        """Whether the last layer is an attention pool after ordinary blocks."""
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
                # Not reentrant: the reentrant kind forbids torch.autograd.grad inside a step,
                # which is how the maps of the local loss are made.
                tokens = checkpoint(layer.run, tokens, self.mask, use_reentrant=False)
            else:
                tokens = layer.run(tokens, self.mask)
        return tokens

    def embed(self, tokens: Float[Tensor, "B N W"], start: int) -> Float[Tensor, "B D"]:
        """Embeddings of a pass that is entered before layer `start`."""
        return self.trace_from(tokens, start).embedding

    def trace(self) -> Trace:
        """The last layer of this pass."""
        return self.trace_from(self.tokens, 0)

    def trace_from(self, tokens: Float[Tensor, "B N W"], start: int) -> Trace:
        """The last layer of a pass that is entered before layer `start`."""
        tokens = self.run(tokens, start, len(self.layers) - 1)
        last, head, query = self.layers[-1], self.head, self.query

        def attend(rows: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            # Only the query row needs a q: (B, C) instead of (B, N, C). With `finish` on one row as
            # well, k and v are what remains of the block: a sixth of its matrix products.
            return last.attend(rows, lambda y: query_rows(y, query))

        def finish(x: Tensor, o: Tensor) -> Tensor:
            return head(last.finish(x, o))

        # A mask of (N, N) or (B, N, N) becomes what the query row sees, (B, N).
        mask = None if query is None else self.mask
        if mask is not None and query is not None:
            mask = mask[query] if mask.ndim == 2 else query_rows(mask, query)
        q, k, v = attend(tokens, query)
        o = attend_row(q, k, v, heads=last.heads, mask=mask)
        return Trace(
            tokens=tokens,
            query=query,
            q=q,
            k=k,
            v=v,
            o=o,
            embedding=finish(query_rows(tokens, query), o),
            heads=last.heads,
            mask=mask,
            explained=self.explained,
            grid=self.grid,
            finish=finish,
            attend=attend,
            project=last.project,
            layer=last,
            head=head,
            score=self.score,
        )


@dataclass(frozen=True)
class LayerRecord:
    """One layer of a record; its tensors are in the graph of the embedding.

    Attributes:
        layer: How the layer comes apart.
        x: Its input.
        q: Queries of all rows, heads joined, positions applied.
        k: Keys.
        v: Values.
        o: Attention outputs, before any norm or projection.
        attention: Attention weights.
    """

    layer: Layer
    x: Float[Tensor, "P N W"]
    q: Float[Tensor, "P N C"]
    k: Float[Tensor, "P N C"]
    v: Float[Tensor, "P N C"]
    o: Float[Tensor, "P N C"]
    attention: Float[Tensor, "P A N N"]


@dataclass(frozen=True)
class Record:
    """The last n layers of a pass, one row of inputs per target.

    Attributes:
        layers: First to last.
        tokens: After the last layer.
        opened: The pass that was recorded.
        embedding: Of every row.
        logit_scale: Factor from score to logit: the inverse temperature of a CLIP.
    """

    layers: tuple[LayerRecord, ...]
    tokens: Float[Tensor, "P N W"]
    opened: Pass
    embedding: Float[Tensor, "P D"]
    logit_scale: Tensor | float = 1.0

    @property
    def explained(self) -> Bool[Tensor, "P N"]:
        """Tokens that a map speaks of."""
        return self.opened.explained

    def of_query(self, rows: Float[Tensor, "P N K"]) -> Float[Tensor, "P K"]:
        """The query's row of every sequence."""
        return query_rows(rows, self.opened.query)

    @property
    def visible(self) -> Bool[Tensor, "P N"]:
        """Tokens that the query may see."""
        mask, query = self.opened.mask, self.opened.query
        if mask is None or query is None:
            return torch.ones_like(self.explained)
        return query_rows(mask.expand(len(query), -1, -1), query) == 0


def record_layers(
    opened: Pass, owner: Int[Tensor, " P"], *, depth: int | None, heads: Heads
) -> Record:
    """Record the last layers, with one row of inputs per target.

    The layers before run once per input, natively and without a graph; the graph begins at the
    input of the first recorded layer.

    Args:
        opened: The pass of B inputs.
        owner: Input of each target.
        depth: Number of layers, at most; None for all.
        heads: The model's own, or one over all channels (Grad-ECLIP, eq. 7): another pass.

    Raises:
        UnsupportedTowerError: The explained layer is a pool, so there are no layers to join.
        ValueError: `depth` is below 1.
    """
    count = len(opened.layers)
    if opened.is_pooled:
        raise UnsupportedTowerError(
            "this tower is pooled by attention, so methods over several layers, and those that "
            f"follow its class token, have nothing to follow; choose {ONE_LAYER}"
        )
    if depth is not None and depth < 1:
        raise ValueError(f"depth is {depth}; choose 1 to {count} layers, or null for all")
    start = 0 if depth is None else max(0, count - depth)
    with torch.no_grad():
        before = opened.run(opened.tokens, 0, start)  # (B, N, W): once per input, not per target
    # Every target gets rows of its own, (P, N, W). Sharing them would sum the gradients of all
    # targets of an input, and each target needs its own through every layer.
    rows = opened.rows(owner)
    tokens = before[owner].float().detach().requires_grad_()
    layers = []
    for layer in opened.layers[start:]:
        q, k, v = layer.attend(tokens, lambda y: y)
        # Written out instead of `layer.run`: fused kernels do not give the attention weights.
        number = layer.heads if heads == "all" else 1
        o, weights = attend(q, k, v, heads=number, mask=rows.mask)
        layers.append(LayerRecord(layer, tokens, q, k, v, o, weights))
        tokens = layer.finish(tokens, o)
    return Record(tuple(layers), tokens, rows, opened.head(query_rows(tokens, rows.query)))
