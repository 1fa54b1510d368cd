"""Queries, keys and values out of one weight, of which some rows need no query."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from gradeclip_ft.models.passes import Pick


def project_fused(
    y: Tensor, pick: Pick, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Q of the picked rows, k and v of all.

    Args:
        y: Normed tokens (B, N, W).
        pick: Which rows need a query.
        weight: (3 C, W), the queries' part first.
        bias: (3 C), or None.
    """
    width = len(weight) // 3
    first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
    q = linear(pick(y), weight[:width], first)
    k, v = linear(y, weight[width:], rest).chunk(2, dim=-1)
    return q, k, v
