"""Small functions on heat maps: 0-1 normalisation, tokens to grid, grid to pixels."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate


def min_max(
    x: Float[Tensor, "R N"], among: Bool[Tensor, "R N"], *, eps: float = 1e-8
) -> Float[Tensor, "R N"]:
    """0-1 normalisation of every row (Φ in Grad-ECLIP, eq. 20); a constant row becomes 1.

    Args:
        x: One row per map.
        among: Positions that define minimum and maximum and are normalised; all others become 0.
        eps: Rows whose range is smaller count as constant.
    """
    low = x.masked_fill(~among, torch.inf).amin(-1, keepdim=True)
    high = x.masked_fill(~among, -torch.inf).amax(-1, keepdim=True)
    flat = high - low < eps
    scaled = (x - low) / (high - low).masked_fill(flat, 1.0)
    return torch.where(flat, 1.0, scaled).masked_fill(~among, 0.0)


def to_grid(relevance: Float[Tensor, "P N"], grid: tuple[int, int]) -> Float[Tensor, "P h w"]:
    """Relevance of the patch tokens, which are the last h·w of all tokens, as a map."""
    height, width = grid
    return relevance[:, relevance.shape[1] - height * width :].reshape(-1, height, width)


def to_pixels(heat: Float[Tensor, "P h w"], size: tuple[int, int]) -> Float[Tensor, "P H W"]:
    """Maps at the size of the picture, bilinear, patch centres staying where they are.

    Args:
        heat: On the grid of the patches.
        size: (height, width) in pixels.
    """
    enlarged: Tensor = interpolate(
        heat.unsqueeze(1), size=list(size), mode="bilinear", align_corners=False
    )
    return enlarged.squeeze(1)
