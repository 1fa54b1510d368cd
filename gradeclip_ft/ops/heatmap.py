"""Small functions on heat maps: 0-1 normalisation, tokens to grid, grid to pixels."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def min_max(
    x: Float[Tensor, "R N"],
    among: Bool[Tensor, "R N"] | None = None,
    *,
    eps: float = 1e-8,
    constant: float = 1.0,
) -> Float[Tensor, "R N"]:
    """0-1 normalisation of every row (Φ in Grad-ECLIP, eq. 20).

    Args:
        x: One row per map.
        among: Positions that define minimum and maximum and are normalised; all others become 0.
        eps: Rows whose range is smaller count as constant.
        constant: Value of a constant row (1 for λ, 0 for pictures).
    """
    if among is None:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    else:
        low = x.masked_fill(~among, torch.inf).amin(-1, keepdim=True)
        high = x.masked_fill(~among, -torch.inf).amax(-1, keepdim=True)
    extent = high - low
    flat = extent < eps
    scaled = (x - low) / extent.masked_fill(flat, 1.0)
    scaled = torch.where(flat, torch.full_like(scaled, constant), scaled)
    return scaled if among is None else scaled.masked_fill(~among, 0.0)


def to_grid(relevance: Float[Tensor, "P N"], grid: tuple[int, int]) -> Float[Tensor, "P h w"]:
    """Relevance of the patch tokens, which are the last h·w of all tokens, as a map."""
    height, width = grid
    return relevance[:, relevance.shape[1] - height * width :].reshape(-1, height, width)


def to_pixels(heat: Float[Tensor, "P h w"], size: tuple[int, int]) -> Float[Tensor, "P H W"]:
    """Heat maps for pictures: 0-1 normalised (a constant map is 0), bilinear to (height, width)."""
    flat = min_max(heat.flatten(1), constant=0.0).view_as(heat)
    return torch.nn.functional.interpolate(
        flat.unsqueeze(1), size=size, mode="bilinear", align_corners=False
    ).squeeze(1)
