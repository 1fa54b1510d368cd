"""The library's own forward pass with its attention written out, for slow versions of methods.

Torch's fused attention is replaced by the formula, so that attention weights and outputs of every
layer are nodes of the library's own graph. Nothing of the package is used here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Seen:
    """One attention call: (B, A, N, c) and (B, A, N, N)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    weights: torch.Tensor
    o: torch.Tensor

    def rows(self, name: str) -> torch.Tensor:
        """Heads joined, (B, N, C)."""
        return getattr(self, name).transpose(1, 2).flatten(2)


@contextmanager
def written_out(*, single_head_from: int | None = None) -> Iterator[list[Seen]]:
    """Replace torch's attention; from call number `single_head_from` on with one head."""
    seen: list[Seen] = []
    native = nn.functional.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, *_: object, **__: object) -> torch.Tensor:
        heads = q.shape[1]
        single = single_head_from is not None and len(seen) >= single_head_from
        if single:
            q, k, v = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (q, k, v))
            if attn_mask is not None and attn_mask.ndim == 4:
                attn_mask = attn_mask[:, :1]
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        weights = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
        o = weights @ v
        seen.append(Seen(q, k, v, weights, o))
        if single:
            o = o.squeeze(1).unflatten(2, (heads, -1)).transpose(1, 2)
        return o

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield seen
    finally:
        nn.functional.scaled_dot_product_attention = native


def zero_one(values: torch.Tensor) -> torch.Tensor:
    """From 0 to 1 over a vector."""
    return (values - values.min()) / (values.max() - values.min())
