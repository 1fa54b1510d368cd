"""Adapter: EVA trunks of timm inside open_clip's TimmModel (EVA01, EVA02, also post-norm).

Their particulars: rotary positions on the patch rows of q and k, an inner norm between attention
and projection, keys without bias, SwiGLU, a head with bias.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn
from torch.nn.functional import linear

from gradeclip_ft.models.tower import Foreign, image_grid
from gradeclip_ft.models.towers.block import run_blocks
from gradeclip_ft.models.towers.timm_embed import check_trunk, embed_patches, refuse, rotary
from gradeclip_ft.models.trace import Trace, class_token_query, query_rows, trace_layer


class EvaTower:
    """Image tower around a TimmModel whose trunk is an Eva with a class token."""

    pooling = "class token"
    unexplained: str | None = None

    def __init__(self, visual: Foreign) -> None:
        trunk = visual.trunk
        _check(trunk)
        self._visual, self._trunk = visual, trunk
        self._last = trunk.blocks[-1]
        self.width = int(trunk.embed_dim)
        self.heads = int(self._last.attn.num_heads)
        self.depth = len(trunk.blocks)
        self.patch = int(trunk.patch_embed.patch_size[0])

    def encode(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Embeddings F_I, not normalised, equal to `encode_image`."""
        return self.trace(x).embedding

    def trace(self, x: Float[Tensor, "B 3 H W"]) -> Trace:
        """The last layer of this forward pass; the query is the class token."""
        grid = image_grid(x, self.patch)
        trunk, rope = self._trunk, rotary(self._trunk, grid)

        def step(block: Foreign, rows: Tensor) -> Tensor:
            result: Tensor = block(rows, rope=rope)
            return result

        def attend(rows: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            return _query_key_value(self._last, rows, query, rope)

        tokens = run_blocks(
            trunk.blocks[:-1],
            embed_patches(trunk, x, grid),
            step,
            checkpointed=trunk.grad_checkpointing,
        )
        query, explained = class_token_query(tokens, grid)
        return trace_layer(
            tokens,
            query,
            attend=attend,
            finish=self._finish,
            project=self._last.attn.proj,
            heads=self.heads,
            explained=explained,
            grid=grid,
        )

    def _finish(self, x: Tensor, o: Tensor) -> Tensor:
        block, trunk = self._last, self._trunk
        attended = block.attn.proj(block.attn.norm(o))
        if isinstance(block, EvaBlockPostNorm):
            x = x + block.norm1(attended)
            x = x + block.norm2(block.mlp(x))
        else:
            x = x + (attended if block.gamma_1 is None else block.gamma_1 * attended)
            mixed = block.mlp(block.norm2(x))
            x = x + (mixed if block.gamma_2 is None else block.gamma_2 * mixed)
        result: Tensor = self._visual.head(trunk.head(trunk.fc_norm(trunk.norm(x))))
        return result


def _query_key_value(
    block: Foreign, tokens: Tensor, query: Tensor | None, rope: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    attention = block.attn
    y = tokens if isinstance(block, EvaBlockPostNorm) else block.norm1(tokens)
    row = query_rows(y, query)
    if attention.qkv is None:
        q, k, v = attention.q_proj(row), attention.k_proj(y), attention.v_proj(y)
    else:
        weights = attention.qkv.weight.chunk(3)
        q = linear(row, weights[0], attention.q_bias)
        k, v = linear(y, weights[1]), linear(y, weights[2], attention.v_bias)
    if rope is not None:
        k = _rotate(k, rope, attention).to(v.dtype)
    return q, k, v


def _rotate(k: Tensor, rope: Tensor, attention: Foreign) -> Tensor:
    """Rotary positions on all rows behind the class token, head by head."""
    heads, first = attention.num_heads, attention.num_prefix_tokens
    split = k.view(*k.shape[:2], heads, k.shape[2] // heads).transpose(1, 2)  # (B, A, N, c)
    rotated = apply_rot_embed_cat(split[:, :, first:], rope, half=attention.rotate_half)
    joined = torch.cat([split[:, :, :first], rotated.to(split.dtype)], dim=2)
    return joined.transpose(1, 2).flatten(2)


def _check(trunk: Foreign) -> None:
    check_trunk(trunk)
    block = trunk.blocks[-1]
    attention = block.attn
    refuse(
        {
            f"pools by {trunk.global_pool!r}": trunk.global_pool != "token",
            f"has {type(block).__name__} blocks": not isinstance(
                block, EvaBlock | EvaBlockPostNorm
            ),
            f"has {type(attention).__name__}": not isinstance(attention, EvaAttention),
            "gates its attention": getattr(attention, "gate", None) is not None,
            "normalises queries and keys": not isinstance(
                getattr(attention, "q_norm", None), nn.Identity
            ),
        }
    )
