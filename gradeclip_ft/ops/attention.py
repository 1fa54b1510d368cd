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
    scale: float | None = None,
) -> Float[Tensor, "B C"]:
    """Attention output of one query row, before the output projection (Grad-ECLIP, eqs. 2 and 7).

    Args:
        q: The query row, heads joined.
        k: Keys of all tokens, positions applied.
        v: Values of all tokens.
        heads: Number of heads the width is split into; 1 gives the single head of eq. 7.
        mask: Added to the scores; -inf hides a key.
        scale: Factor of q·k; None for (C / heads)^-0.5.
    """
    weights = row_weights(q, k, heads=heads, mask=mask, scale=scale).to(v.dtype)
    split = v.view(*v.shape[:2], heads, v.shape[2] // heads)
    return torch.einsum("ban,bnac->bac", weights, split).reshape(q.shape)


def row_weights(
    q: Float[Tensor, "B C"],
    k: Float[Tensor, "B N C"],
    *,
    heads: int,
    mask: Float[Tensor, "B N"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B A N"]:
    """Attention weights of one query row, by head, in fp32; see `attend_row`."""
    batch, tokens, width = k.shape
    depth = width // heads
    # Plain products, no fused kernel: `create_graph` differentiates this a second time.
    split = k.reshape(batch, tokens, heads, depth)
    scores = torch.einsum("bac,bnac->ban", q.reshape(batch, heads, depth), split)
    scores = scores / math.sqrt(depth) if scale is None else scores * scale
    if mask is not None:
        scores = scores + mask.unsqueeze(1)
    return scores.float().softmax(-1)  # bf16 would leave N weights 3 digits


def attend(
    q: Float[Tensor, "B N C"],
    k: Float[Tensor, "B N C"],
    v: Float[Tensor, "B N C"],
    *,
    heads: int,
    mask: Tensor | None = None,
) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B A N N"]]:
    """Attention outputs of all rows, before the output projection, and the attention weights.

    Args:
        q: Queries of all tokens, heads joined, positions applied.
        k: Keys.
        v: Values.
        heads: Number of heads the width is split into.
        mask: Added to the scores: (N, N) or (B, N, N).
    """
    batch, tokens, width = k.shape
    split = (batch, tokens, heads, width // heads)
    # Joined heads to (B, A, N, c), so that one product serves all of them.
    queries, keys, values = (rows.reshape(split).transpose(1, 2) for rows in (q, k, v))
    scores = queries @ keys.transpose(2, 3) / math.sqrt(width // heads)  # (B, A, N, N)
    if mask is not None:
        scores = scores + (mask if mask.ndim == 2 else mask.unsqueeze(1))
    weights = scores.float().softmax(-1).to(v.dtype)
    return (weights @ values).transpose(1, 2).reshape(batch, tokens, width), weights
