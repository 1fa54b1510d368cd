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

from gradeclip_ft.models.passes import Layer, Pass, Pick
from gradeclip_ft.models.tower import Foreign, image_grid
from gradeclip_ft.models.towers.base import PassTower
from gradeclip_ft.models.towers.timm_embed import check_trunk, embed_patches, refuse, rotary
from gradeclip_ft.models.trace import class_token_query


class EvaTower(PassTower):
    """Image tower around a TimmModel whose trunk is an Eva with a class token."""

    pooling = "class token"

    def __init__(self, visual: Foreign) -> None:
        trunk = visual.trunk
        _check(trunk)
        self._visual, self._trunk = visual, trunk
        self.width = int(trunk.embed_dim)
        self.heads = int(trunk.blocks[-1].attn.num_heads)
        self.depth = len(trunk.blocks)
        self.patch = int(trunk.patch_embed.patch_size[0])

    def open(self, x: Float[Tensor, "B 3 H W"]) -> Pass:
        """This forward pass; the query is the class token."""
        grid = image_grid(x, self.patch)
        rope = rotary(self._trunk, grid)
        tokens = embed_patches(self._trunk, x, grid)
        query, explained = class_token_query(tokens, grid)
        return Pass(
            tokens,
            tuple(block_layer(block, rope) for block in self._trunk.blocks),
            self._head,
            query,
            explained,
            grid,
            checkpointed=self._trunk.grad_checkpointing,
        )

    def _head(self, rows: Tensor) -> Tensor:
        trunk = self._trunk
        result: Tensor = self._visual.head(trunk.head(trunk.fc_norm(trunk.norm(rows))))
        return result


def block_layer(block: Foreign, rope: Tensor | None) -> Layer:
    """EVA's block as a layer at one grid, pre-norm or post-norm."""
    attention, post_norm = block.attn, isinstance(block, EvaBlockPostNorm)

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        y = tokens if post_norm else block.norm1(tokens)
        q, k, v = _project(attention, pick(y), y)
        if rope is not None:
            every = q.ndim == 3  # a single query is that of the class token, which has no position
            q = _rotate(q, rope, attention).to(v.dtype) if every else q
            k = _rotate(k, rope, attention).to(v.dtype)
        return q, k, v

    def add(o: Tensor) -> Tensor:
        attended: Tensor = attention.proj(attention.norm(o))
        if post_norm:
            attended = block.norm1(attended)
        elif block.gamma_1 is not None:
            attended = block.gamma_1 * attended
        return attended

    def finish(x: Tensor, o: Tensor) -> Tensor:
        x = x + add(o)
        if post_norm:
            mixed = block.norm2(block.mlp(x))
        else:
            mixed = block.mlp(block.norm2(x))
            mixed = mixed if block.gamma_2 is None else block.gamma_2 * mixed
        rows: Tensor = x + mixed
        return rows

    def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
        rows: Tensor = block(tokens, rope=rope)
        return rows

    return Layer(attend, finish, add, attention.proj, int(attention.num_heads), run)


def _project(attention: Foreign, row: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q of some rows, k and v of all; projections fused or not, keys without bias."""
    if attention.qkv is None:
        return attention.q_proj(row), attention.k_proj(y), attention.v_proj(y)
    weights = attention.qkv.weight.chunk(3)
    q = linear(row, weights[0], attention.q_bias)
    return q, linear(y, weights[1]), linear(y, weights[2], attention.v_bias)


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
