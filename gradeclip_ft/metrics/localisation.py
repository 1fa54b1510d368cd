"""Does a heat map lie on its object: the pointing game, hard and by energy (Table 4)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TOLERANCE = 1e-6
"""Differences below this part of a map's size are rounding."""


def pointing_game(heat: Float[Tensor, "P H W"], mask: Bool[Tensor, "P H W"]) -> Float[Tensor, " P"]:
    """Share of a map's highest pixels that lie on the object; a constant map scores 0.

    Zhang et al., "Top-down Neural Attention by Excitation Backprop", count a hit where the arg-max
    lies on the object. A bilinearly enlarged map has its maximum at several pixels at once (four,
    or a corner of the picture), so that the arg-max would be a matter of order: all of them count,
    each for its share. There is no tolerance around the object.
    """
    low, high = heat.amin((1, 2)), heat.amax((1, 2))
    highest = heat >= (high - TOLERANCE * (high - low)).view(-1, 1, 1)
    share = (highest & mask).sum((1, 2)) / highest.sum((1, 2))
    return share.masked_fill(is_constant(heat), 0.0)


def energy_pointing_game(
    heat: Float[Tensor, "P H W"], mask: Bool[Tensor, "P H W"]
) -> Float[Tensor, " P"]:
    """Σ H on the object / Σ H, of the map shifted to a minimum of 0; a constant map scores 0.

    Wang et al., "Score-CAM", on the min-maxed map as in Grad-ECLIP's Table 4; the share does not
    depend on the maximum that it is scaled to.
    """
    shifted = (heat - heat.amin((1, 2), keepdim=True)).double()
    total = shifted.sum((1, 2))
    share = (shifted * mask).sum((1, 2)) / total.masked_fill(total == 0, 1.0)
    return share.masked_fill(is_constant(heat), 0.0).to(heat.dtype)


def chance(mask: Bool[Tensor, "P H W"]) -> Float[Tensor, " P"]:
    """Share of the picture that is object: what a random pixel scores, and an even map."""
    return mask.float().mean((1, 2))


def is_constant(heat: Float[Tensor, "P H W"]) -> Bool[Tensor, " P"]:
    """Whether a map says nothing about any place.

    Raises:
        ValueError: A value is not finite.
    """
    if not bool(torch.isfinite(heat).all()):
        raise ValueError("a heat map is not finite; check that the weights are those of a good run")
    size = heat.abs().amax((1, 2))
    return heat.amax((1, 2)) - heat.amin((1, 2)) <= TOLERANCE * size
