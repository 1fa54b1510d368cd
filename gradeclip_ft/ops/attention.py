"""Attention in plain operations, for the layers that are explained.

Fused kernels have no second derivative, which a differentiable heat map needs as soon as its graph
crosses attention.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

DensePath: TypeAlias = Literal["value", "sclip", "clearclip", "naclip", "vv"]
"""How the last layer treats patches, each of which needs a feature of its own.

value: each patch attends to itself alone (MaskCLIP, CLIPSelf). sclip: softmax(s q qᵀ) +
softmax(s k kᵀ). clearclip: softmax(s q qᵀ). naclip: softmax(s k kᵀ + G), G a Gaussian of the
distance. vv: softmax(s v vᵀ), as in CLIP Surgery.
"""

REACH = 5.0  # standard deviation of NACLIP's Gaussian in cells


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


def attend_alike(
    path: DensePath,
    q: Float[Tensor, "B N C"],
    k: Float[Tensor, "B N C"],
    v: Float[Tensor, "B N C"],
    *,
    heads: int,
    grid: tuple[int, int] | None,
) -> Float[Tensor, "B N C"]:
    """Attention outputs of all rows where each token attends to those like it; see `DensePath`.

    Class token and registers are among the tokens, as in the programs of these papers.

    Raises:
        ValueError: NACLIP's window for tokens without a grid.
    """
    if path == "value":
        return v
    if path == "sclip":  # a sum of two distributions: the weights of a row add up to 2
        return attend(q, q, v, heads=heads)[0] + attend(k, k, v, heads=heads)[0]
    if path == "clearclip":
        return attend(q, q, v, heads=heads)[0]
    if path == "vv":
        return attend(v, v, v, heads=heads)[0]
    if grid is None:
        raise ValueError("dense=naclip looks at the distance of patches; texts have none")
    mask = k.new_zeros(k.shape[1], k.shape[1])
    first = k.shape[1] - grid[0] * grid[1]
    mask[first:, first:] = nearness(grid).to(k)  # tokens without a place are near to nothing
    return attend(k, k, v, heads=heads, mask=mask)[0]


def nearness(grid: tuple[int, int]) -> Float[Tensor, "n n"]:
    """Gaussian exp(-d² / 2σ²) of the distance of any two cells (NACLIP, section 3.3)."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1).float()  # (n, 2)
    # Not torch.cdist: its products round, and the distance of a cell to itself must be 0.
    distance = (places[:, None] - places[None]).square().sum(2)
    return torch.exp(-distance / (2 * REACH**2))
