"""Adapter: timm's VisionTransformer with a class token inside open_clip's TimmModel.

DINOv2's layout, for example: layer scale, registers, positions of another grid.
"""

from __future__ import annotations

from jaxtyping import Float
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

from gradeclip_ft.models.passes import Layer, Pass, Pick
from gradeclip_ft.models.tower import Foreign, image_grid
from gradeclip_ft.models.towers.base import PassTower
from gradeclip_ft.models.towers.fused import project_fused
from gradeclip_ft.models.towers.timm_embed import check_trunk, embed_patches, refuse
from gradeclip_ft.models.trace import class_token_query


class TimmVitTower(PassTower):
    """Image tower around a TimmModel whose trunk is a VisionTransformer with a class token."""

    pooling = "class token"

    def __init__(self, visual: Foreign) -> None:
        trunk = visual.trunk
        _check(trunk)
        self._visual, self._trunk = visual, trunk
        self._layers = tuple(block_layer(block) for block in trunk.blocks)
        self.width = int(trunk.embed_dim)
        self.heads = self._layers[-1].heads
        self.depth = len(trunk.blocks)
        self.patch = int(trunk.patch_embed.patch_size[0])

    def open(self, x: Float[Tensor, "B 3 H W"]) -> Pass:
        """This forward pass; the query is the class token."""
        grid = image_grid(x, self.patch)
        tokens = embed_patches(self._trunk, x, grid)
        query, explained = class_token_query(tokens, grid)
        return Pass(
            tokens,
            self._layers,
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


def block_layer(block: Foreign) -> Layer:
    """Timm's block as a layer; pre-norm, with or without layer scale."""
    attention, heads = block.attn, int(block.attn.num_heads)

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = attention.qkv.weight, attention.qkv.bias
        q, k, v = project_fused(block.norm1(tokens), pick, weight, bias)
        return by_head(q, attention.q_norm, heads), by_head(k, attention.k_norm, heads), v

    def add(o: Tensor) -> Tensor:
        added: Tensor = block.ls1(attention.proj(attention.norm(o)))
        return added

    def finish(x: Tensor, o: Tensor) -> Tensor:
        x = x + add(o)
        rows: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
        return rows

    def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
        rows: Tensor = block(tokens)
        return rows

    return Layer(attend, finish, add, attention.proj, heads, run)


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
