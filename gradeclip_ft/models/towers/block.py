"""The residual attention block of open_clip, taken apart: before and behind attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError
from gradeclip_ft.models.trace import query_rows


def check_blocks(blocks: Iterable[Foreign], tower: str) -> None:
    """Refuse blocks whose attention is not the plain one of CLIP.

    Raises:
        UnsupportedTowerError: A block has norms or scales inside attention, or another layout.
    """
    for index, block in enumerate(blocks):
        plain = type(block) is ResidualAttentionBlock and block.attn.in_proj_weight is not None
        if not plain or not block.attn.batch_first:
            raise UnsupportedTowerError(
                f"{tower}: block {index} is {type(block).__name__}, expected open_clip's "
                "ResidualAttentionBlock"
            )


def run_blocks(
    blocks: Iterable[Foreign],
    x: Float[Tensor, "B N C"],
    step: Callable[[Foreign, Tensor], Tensor],
    *,
    checkpointed: bool,
) -> Float[Tensor, "B N C"]:
    """Blocks in order; with `checkpointed`, activations are computed again in the backward pass."""
    for block in blocks:
        if checkpointed and torch.is_grad_enabled():
            x = checkpoint(step, block, x, use_reentrant=False)
        else:
            x = step(block, x)
    return x


def plain_step(block: Foreign, x: Tensor) -> Tensor:
    """A block that takes nothing but its rows."""
    result: Tensor = block(x)
    return result


def query_key_value(
    block: Foreign, tokens: Float[Tensor, "B N C"], query: Int[Tensor, " B"] | None
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N C"], Float[Tensor, "B N C"]]:
    """Query of one row, keys and values of all, heads joined."""
    y = block.ln_1(tokens)
    width = y.shape[-1]
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    q = linear(query_rows(y, query), weight[:width], bias[:width])
    k, v = linear(y, weight[width:], bias[width:]).chunk(2, dim=-1)
    return q, k, v


def behind_attention(block: Foreign, x: Tensor, o: Tensor) -> Tensor:
    """Output of the block from its input rows x and the attention output o of these rows."""
    x = x + block.ls_1(block.attn.out_proj(o))
    rows: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return rows
