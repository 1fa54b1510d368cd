"""The residual attention block of open_clip, taken apart."""

from __future__ import annotations

from collections.abc import Iterable

from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor

from gradeclip_ft.models.passes import Layer, Pick
from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError
from gradeclip_ft.models.towers.fused import project_fused


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


def block_layer(block: Foreign) -> Layer:
    """A block as a layer; pre-norm, with or without layer scale."""
    heads = int(block.attn.num_heads)

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        return project_fused(block.ln_1(tokens), pick, weight, bias)

    def add(o: Tensor) -> Tensor:
        added: Tensor = block.ls_1(block.attn.out_proj(o))
        return added

    def finish(x: Tensor, o: Tensor) -> Tensor:
        x = x + add(o)
        rows: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
        return rows

    def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.ndim == 3:  # the library wants one mask for every head
            mask = mask.repeat_interleave(heads, dim=0)
        rows: Tensor = block(tokens, attn_mask=mask)
        return rows

    return Layer(attend, finish, add, block.attn.out_proj, heads, run)
