"""Attention in plain operations, for the layers that are explained.

Fused kernels have no second derivative, which a differentiable heat map needs as soon as its graph
crosses attention.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def attend_row(
    q: Float[Tensor, "B C"],
    k: Float[Tensor, "B N C"],
    v: Float[Tensor, "B N C"],
    *,
    heads: int,
    mask: Float[Tensor, "B N"] | None = None,
) -> Float[Tensor, "B C"]:
    """Attention output of one query row, before the output projection (Grad-ECLIP, eqs. 2 and 7).

    Args:
        q: The query row, heads joined.
        k: Keys of all tokens, positions applied.
        v: Values of all tokens.
        heads: Number of heads the width is split into; 1 gives the single head of eq. 7. The scale
            is (C / heads)^-0.5.
        mask: Added to the scores; -inf hides a key.
    """
    batch, tokens, width = k.shape
    depth = width // heads
    q = q.view(batch, heads, depth)
    k = k.view(batch, tokens, heads, depth)
    v = v.view(batch, tokens, heads, depth)
    scores = torch.einsum("bac,bnac->ban", q, k) / math.sqrt(depth)  # (B, A, N)
    if mask is not None:
        scores = scores + mask.unsqueeze(1)
    weights = scores.float().softmax(-1).to(v.dtype)
    return torch.einsum("ban,bnac->bac", weights, v).reshape(batch, width)
