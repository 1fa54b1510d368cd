"""The last layers of one forward pass, written out: attention weights and outputs of every row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradeclip_ft.models.passes import Layer, Pass
from gradeclip_ft.models.tower import UnsupportedTowerError
from gradeclip_ft.models.trace import Heads, query_rows
from gradeclip_ft.ops.attention import attend

ONE_LAYER = "grad_eclip, raw_attention, grad_cam, maskclip, rise or integrated_gradients"


@dataclass(frozen=True)
class LayerRecord:
    """One layer of a record; tensors stand in the graph of the embedding.

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
        tokens: Behind the last layer.
        opened: The pass that was recorded.
        embedding: Of every row.
    """

    layers: tuple[LayerRecord, ...]
    tokens: Float[Tensor, "P N W"]
    opened: Pass
    embedding: Float[Tensor, "P D"]

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
        before = opened.run(opened.tokens, 0, start)
    rows = opened.rows(owner)
    tokens = before[owner].float().detach().requires_grad_()
    layers = []
    for layer in opened.layers[start:]:
        q, k, v = layer.attend(tokens, lambda y: y)
        number = layer.heads if heads == "all" else 1
        o, weights = attend(q, k, v, heads=number, mask=rows.mask)
        layers.append(LayerRecord(layer, tokens, q, k, v, o, weights))
        tokens = layer.finish(tokens, o)
    return Record(tuple(layers), tokens, rows, opened.head(query_rows(tokens, rows.query)))
