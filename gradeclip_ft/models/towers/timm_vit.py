"""Adapter: timm's VisionTransformer with a class token inside open_clip's TimmModel.

DINOv2's layout, for example: layer scale, registers, positions of another grid.
"""

from __future__ import annotations

from jaxtyping import Float
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn.functional import linear

from gradeclip_ft.models.tower import Foreign, image_grid
from gradeclip_ft.models.towers.block import plain_step, run_blocks
from gradeclip_ft.models.towers.timm_embed import check_trunk, embed_patches, refuse
from gradeclip_ft.models.trace import Trace, class_token_query, query_rows, trace_layer


class TimmVitTower:
    """Image tower around a TimmModel whose trunk is a VisionTransformer with a class token."""

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
        trunk = self._trunk
        tokens = run_blocks(
            trunk.blocks[:-1],
            embed_patches(trunk, x, grid),
            plain_step,
            checkpointed=trunk.grad_checkpointing,
        )
        query, explained = class_token_query(tokens, grid)
        return trace_layer(
            tokens,
            query,
            attend=self._attend,
            finish=self._finish,
            project=self._last.attn.proj,
            heads=self.heads,
            explained=explained,
            grid=grid,
        )

    def _attend(self, tokens: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        attention, y = self._last.attn, self._last.norm1(tokens)
        width = attention.attn_dim
        weight, bias = attention.qkv.weight, attention.qkv.bias
        first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
        q = linear(query_rows(y, query), weight[:width], first)
        k, v = linear(y, weight[width:], rest).chunk(2, dim=-1)
        return by_head(q, attention.q_norm, self.heads), by_head(k, attention.k_norm, self.heads), v

    def _finish(self, x: Tensor, o: Tensor) -> Tensor:
        block, trunk = self._last, self._trunk
        x = x + block.ls1(block.attn.proj(block.attn.norm(o)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        result: Tensor = self._visual.head(trunk.head(trunk.fc_norm(trunk.norm(x))))
        return result


def by_head(x: Tensor, norm: Foreign, heads: int) -> Tensor:
    """A norm over the channels of every head, heads joined before and after."""
    split = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    normed: Tensor = norm(split).flatten(-2)
    return normed


def _check(trunk: Foreign) -> None:
    check_trunk(trunk)
    block = trunk.blocks[-1]
    refuse(
        {
            f"pools by {trunk.global_pool!r}": trunk.global_pool != "token",
            f"has {type(block).__name__} blocks": type(block) is not Block,
            f"has {type(block.attn).__name__}": type(block.attn) is not Attention,
            "gates its attention": getattr(block.attn, "gate", None) is not None,
        }
    )
