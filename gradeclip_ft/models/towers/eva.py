"""Adapter: EVA-02 trunk of timm inside open_clip's TimmModel.

Its particulars: rotary positions on the patch rows of q and k, an inner norm between attention
and projection, keys without bias, SwiGLU, a head with bias.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from torch.nn.functional import linear

from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError
from gradeclip_ft.models.towers.block import run_blocks
from gradeclip_ft.models.trace import Trace, class_token_query, query_rows, trace_layer


class EvaTower:
    """Image tower around a TimmModel whose trunk is an Eva."""

    def __init__(self, visual: Foreign) -> None:
        trunk = visual.trunk
        _check(trunk)
        self._visual, self._trunk = visual, trunk
        self._last = trunk.blocks[-1]
        self.width = int(trunk.embed_dim)
        self.heads = int(self._last.attn.num_heads)
        self.depth = len(trunk.blocks)
        self.patch = int(trunk.patch_embed.patch_size[0])

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (h, w)."""
        height, width = self._trunk.patch_embed.grid_size
        return int(height), int(width)

    def encode(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Embeddings F_I, not normalised, equal to `encode_image`."""
        return self.trace(x).embedding

    def trace(self, x: Float[Tensor, "B 3 H W"]) -> Trace:
        """The last layer of this forward pass; the query is the class token."""
        trunk = self._trunk
        embedded, rope = trunk._pos_embed(trunk.patch_embed(x))

        def step(block: Foreign, rows: Tensor) -> Tensor:
            result: Tensor = block(rows, rope=rope)
            return result

        def attend(rows: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return _query_key_value(self._last, rows, query, rope)

        tokens = run_blocks(
            trunk.blocks[:-1],
            trunk.norm_pre(embedded),
            step,
            checkpointed=trunk.grad_checkpointing,
        )
        query, explained = class_token_query(tokens)
        return trace_layer(
            tokens,
            query,
            attend=attend,
            finish=self._finish,
            project=self._last.attn.proj,
            heads=self.heads,
            explained=explained,
            grid=self.grid,
        )

    def _finish(self, x: Tensor, o: Tensor) -> Tensor:
        block, trunk = self._last, self._trunk
        attended = block.attn.proj(block.attn.norm(o))
        x = x + (attended if block.gamma_1 is None else block.gamma_1 * attended)
        mixed = block.mlp(block.norm2(x))
        x = x + (mixed if block.gamma_2 is None else block.gamma_2 * mixed)
        result: Tensor = self._visual.head(trunk.head(trunk.fc_norm(trunk.norm(x))))
        return result


def _query_key_value(
    block: Foreign, tokens: Tensor, query: Tensor, rope: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    attention, y = block.attn, block.norm1(tokens)
    row = query_rows(y, query)
    if attention.qkv is None:
        q, k, v = attention.q_proj(row), attention.k_proj(y), attention.v_proj(y)
    else:
        weights = attention.qkv.weight.chunk(3)
        q = linear(row, weights[0], attention.q_bias)
        k, v = linear(y, weights[1]), linear(y, weights[2], attention.v_bias)
    if rope is not None:
        k = _rotate(k, rope, attention.num_heads, half=attention.rotate_half).to(v.dtype)
    return q, k, v


def _rotate(k: Tensor, rope: Tensor, heads: int, *, half: bool) -> Tensor:
    """Rotary positions on all rows behind the class token, head by head."""
    split = k.view(*k.shape[:2], heads, k.shape[2] // heads).transpose(1, 2)  # (B, A, N, c)
    rotated = apply_rot_embed_cat(split[:, :, 1:], rope, half=half)
    joined = torch.cat([split[:, :, :1], rotated.to(split.dtype)], dim=2)
    return joined.transpose(1, 2).flatten(2)


def _check(trunk: Foreign) -> None:
    attention = trunk.blocks[-1].attn
    problems = {
        "pools by attention": trunk.attn_pool is not None,
        f"pools by {trunk.global_pool!r}": trunk.global_pool != "token",
        f"has {trunk.num_prefix_tokens} prefix tokens": trunk.num_prefix_tokens != 1,
        "has post-norm blocks": not isinstance(trunk.blocks[-1], EvaBlock),
        "gates its attention": getattr(attention, "gate", None) is not None,
        "normalises queries and keys": not isinstance(attention.q_norm, nn.Identity),
        "drops patches": trunk.patch_drop is not None,
        "mixes rotary positions by depth": bool(getattr(trunk, "rope_mixed", False)),
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise UnsupportedTowerError(
            f"image tower {found[0]}, expected an EVA-02 trunk with one class token; choose "
            "EVA02-B-16 or ViT-B-16, for example"
        )
