"""Grad-ECLIP over the last n layers (the journal version; texts: n = 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.trace import Heads, Record
from gradeclip_ft.ops.heatmap import min_max
from gradeclip_ft.ops.similarity import unit


@dataclass(frozen=True)
class GradEclipDeep:
    """H = Σ over layers of λ_i Σ_c w_c v_ic, w the full backward of S to the layer's o.

    With one layer it is `GradEclip`.

    Attributes:
        depth: Number of last layers, at most; None for all.
        heads: One head over all channels in each of these layers, or the model's own.
        relu_at: Positive part of every layer's map before the sum (images, as published), or of the
            sum (texts, as published).
        minmax_over: Tokens among which λ runs from 0 to 1: those that are explained (images), those
            that the query sees (texts; independent of the context's length), or all, hidden ones
            too, as in the authors' script for texts.
        spatial: λ as in `GradEclip`, or 1 (the rows "w/o λ" of the paper).
    """

    depth: int | None = 8
    heads: Heads = "one"
    relu_at: Literal["layer", "sum"] = "layer"
    minmax_over: Literal["explained", "visible", "all"] = "explained"
    spatial: Literal["minmax", "none"] = "minmax"

    def from_record(self, record: Record, target: Float[Tensor, "P D"]) -> Float[Tensor, "P N"]:
        """Relevance of every token for each target."""
        score = record.opened.score(record.embedding, target).sum()
        nodes = [layer.o for layer in record.layers]
        weights = torch.autograd.grad(score, nodes, retain_graph=True)
        if self.minmax_over == "explained":
            among = record.explained
        else:
            visible = record.visible
            among = visible if self.minmax_over == "visible" else torch.ones_like(visible)
        total: Tensor | None = None
        for layer, gradient in zip(record.layers, weights, strict=True):
            weight = record.of_query(gradient)  # (P, C)
            value = torch.bmm(layer.v.detach(), weight.unsqueeze(2)).squeeze(2)
            relevance = value
            if self.spatial == "minmax":
                # λ: cosine of the query's q and every k, 0-1 normalised (eq. 20)
                q = unit(record.of_query(layer.q.detach()))
                similarity = torch.bmm(unit(layer.k.detach()), q.unsqueeze(2)).squeeze(2)
                relevance = min_max(similarity, among) * value
            relevance = relevance.relu() if self.relu_at == "layer" else relevance
            total = relevance if total is None else total + relevance
        assert total is not None
        return total.relu()
