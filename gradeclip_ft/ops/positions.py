"""Learned position embeddings at another grid, as CLIP's descendants publish it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, cat
from torch.nn.functional import interpolate


def resample_positions(
    table: Float[Tensor, "N C"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "M C"]:
    """A table of position embeddings for another grid; leading rows (class, registers) stay.

    Bicubic without antialias, corners not aligned: what CLIPSelf, F-ViT and the Grad-ECLIP authors'
    script do. open_clip and timm antialias, which differs in the third digit.

    Args:
        table: Leading rows, then one row per cell of the old grid, row by row.
        old: (h, w) of the table.
        new: (h, w) wanted; the table itself comes back where both are equal.

    Raises:
        ValueError: The table is smaller than the old grid.
    """
    if old == new:
        return table
    first = len(table) - old[0] * old[1]
    if first < 0:
        raise ValueError(f"{len(table)} position embeddings, expected a {old[0]} x {old[1]} grid")
    cells = table[first:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized = interpolate(cells, size=new, mode="bicubic", align_corners=False)
    rows = resized.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1)
    return cat([table[:first], rows.to(table.dtype)])
