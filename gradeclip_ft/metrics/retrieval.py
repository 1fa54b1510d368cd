"""Recall@k of retrieval: the share of queries with at least one hit among the first k.

CLIP's definition. Where a query has several right answers it is torchmetrics' RetrievalHitRate,
not RetrievalRecall.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradeclip_ft.metrics.accuracy import require_finite
from gradeclip_ft.ops.similarity import unit


def first_hits(
    scores: Float[Tensor, "Q G"], relevant: Bool[Tensor, "Q G"]
) -> tuple[Int[Tensor, " Q"], Bool[Tensor, " Q"]]:
    """Items that come before the first right one, and whether a wrong one scores the same.

    Of equal scores the first item wins. Every query needs a right item.
    """
    require_finite(scores)
    items = torch.arange(scores.shape[1], device=scores.device)
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)  # (Q, 1)
    equal = scores == best
    first = items.where(equal & relevant, scores.shape[1]).amin(1, keepdim=True)
    before = (scores > best) | (equal & (items < first))
    return before.sum(1), (equal & ~relevant).any(1)


def search(
    queries: Float[Tensor, "Q D"],
    gallery: Float[Tensor, "G D"],
    query_key: Int[Tensor, " Q"],
    gallery_key: Int[Tensor, " G"],
    *,
    chunk: int = 512,
) -> tuple[Int[Tensor, " Q"], Bool[Tensor, " Q"]]:
    """`first_hits` of every query by cosine in fp32; right items are those of the same key.

    Args:
        queries: Embeddings, of any length.
        gallery: Embeddings, of any length.
        query_key: Image number of each query.
        gallery_key: Image number of each item.
        chunk: Queries compared at a time; bounds memory, not the result.
    """
    items = unit(gallery).T  # (D, G)
    found = []
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        relevant = query_key[part].unsqueeze(1) == gallery_key
        found.append(first_hits(unit(queries[part]) @ items, relevant))
    ranks, ties = zip(*found, strict=True)
    return torch.cat(ranks), torch.cat(ties)


def recall(ranks: Int[Tensor, " Q"], topk: Sequence[int]) -> dict[int, float]:
    """Share of queries whose first hit is among the first k.

    >>> recall(torch.tensor([0, 4, 7]), (1, 5))
    {1: 0.3333333333333333, 5: 0.6666666666666666}
    """
    return {k: float((ranks < k).double().mean()) for k in topk}
