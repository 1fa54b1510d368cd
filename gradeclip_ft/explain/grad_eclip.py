"""Grad-ECLIP on the last layer (eqs. 15, 19 and 20), all phrases of all images in one gradient.

Only the query row of the last attention reaches the embedding, so the channel weight depends on
that row alone: it is gathered by `owner` to P rows, and one gradient gives all weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradeclip_ft.models.trace import Heads, Scale, Trace
from gradeclip_ft.ops.attention import row_weights
from gradeclip_ft.ops.heatmap import min_max, owned_products
from gradeclip_ft.ops.similarity import unit


@dataclass(frozen=True)
class GradEclip:
    """H_i = ReLU(λ_i Σ_c w_c v_ic) over the explained tokens (eq. 19).

    Attributes:
        spatial: λ as the 0-1 normalised similarity of query and key (eq. 20), the attention weight
            of one head, or 1 (the rows "w/o λ" of the paper).
        similarity: For `minmax`: cosine (the authors' code and the follow-up paper), or the product
            that the paper's text names.
        space: q and k as they are, or after the output projection (the authors' script for the
            ImageNet tables).
        heads: One head over all channels (eq. 7), or the model's own.
        scale: Of one head's attention: C^-0.5, or the factor of the model's own heads, as in the
            authors' notebook for BLIP.
        head: One of the model's own heads, counted from 0: the share of its channels, with its own
            λ; None for all channels.
        relu: Keep the positive part only.
        create_graph: Let gradients flow through the map.
    """

    spatial: Literal["minmax", "softmax", "none"] = "minmax"
    similarity: Literal["cosine", "product"] = "cosine"
    space: Literal["raw", "projected"] = "raw"
    heads: Heads = "one"
    scale: Scale = "width"
    head: int | None = None
    relu: bool = True
    create_graph: bool = False

    def from_trace(
        self, trace: Trace, target: Float[Tensor, "P D"], owner: Int[Tensor, " P"]
    ) -> Float[Tensor, "P N"]:
        """Relevance of every token for each target.

        Raises:
            ValueError: The layer has no such head.
        """
        graph = self.create_graph
        weight = channel_weight(trace, target, owner, self.heads, self.scale, create_graph=graph)
        q, k, v = trace.q, trace.k, trace.v
        if self.head is not None:
            if not 0 <= self.head < trace.heads or self.space == "projected":
                raise ValueError(
                    f"head is {self.head} in the space {self.space!r}; choose 0 to "
                    f"{trace.heads - 1}, in the space 'raw': after the output projection channels "
                    "belong to no head"
                )
            q, k, v, weight = (x.chunk(trace.heads, -1)[self.head] for x in (q, k, v, weight))
        # Eq. 19 for all phrases of all images at once: row p takes the values of its own image, and
        # λ, which no phrase changes, is computed once per image.
        value = owned_products(v, weight, owner, most=trace.most)  # (P, N)
        relevance = self._spatial_weight(trace, q, k)[owner] * value
        # The class token has the largest λ of all, its own; it is not a place in the picture.
        relevance = relevance.masked_fill(~trace.explained[owner], 0.0)
        return relevance.relu() if self.relu else relevance

    def _spatial_weight(
        self, trace: Trace, q: Float[Tensor, "B K"], k: Float[Tensor, "B N K"]
    ) -> Float[Tensor, "B N"]:
        """λ, the same for every target (eq. 20)."""
        if self.spatial == "none":
            return torch.ones(k.shape[:2], dtype=k.dtype, device=k.device)
        if self.spatial == "softmax":
            return row_weights(q, k, heads=1, mask=trace.mask).squeeze(1)
        # Eq. 20 replaces the softmax, which is so sparse that most patches would get no weight, by
        # a similarity stretched to 0..1 over the explained tokens.
        if self.space == "projected":
            q, k = trace.project(q), trace.project(k)
        if self.similarity == "product":
            return min_max(torch.einsum("bc,bnc->bn", q, k), trace.explained)
        # The cosine, with lengths divided out of the sums (B, N): unit vectors, of the query for
        # every key too, would be three more (B, N, C), all kept for the backward pass. Not a matrix
        # product: its rounding depends on the row, and equal keys must have equal cosines.
        product = (unit(q).unsqueeze(1) * k.float()).sum(-1)
        length = k.float().norm(dim=-1).clamp(min=1e-12)  # as `unit` has it
        return min_max(product / length, trace.explained)


def channel_weight(
    trace: Trace,
    target: Float[Tensor, "P D"],
    owner: Int[Tensor, " P"],
    heads: Heads = "one",
    scale: Scale = "width",
    *,
    create_graph: bool = False,
) -> Float[Tensor, "P C"]:
    """Channel importance w = ∂S/∂o of the query row (eq. 15).

    Args:
        trace: Rows for B inputs.
        target: Unit embeddings.
        owner: Row of the trace for each target.
        heads: How o is computed: one head over all channels (eq. 7), or the model's own.
        scale: Of one head's attention.
        create_graph: Keep the graph of w.
    """
    # The query row alone: (P, C). No other row of the last attention reaches the embedding, so its
    # gradient is the whole gradient, and one backward through `finish` gives it for all phrases.
    o = trace.output(heads, scale)[owner]
    # Stopped maps cut the graph here: the loss then moves F_d and the phrase, not the map.
    if not (create_graph and o.requires_grad):
        o = o.detach().requires_grad_()
    score = trace.score(trace.finish(trace.query_tokens[owner], o), target)
    # Rows do not mix in `finish` or in the score, so the gradient of the sum is each row's own.
    (weight,) = torch.autograd.grad(score.sum(), o, create_graph=create_graph)
    return weight
