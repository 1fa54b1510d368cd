"""Adapter: open_clip's VisionTransformer with an attention pool (CoCa).

The explained layer is the pool; the first of its learned queries becomes the embedding, its keys
are all tokens, the class token among them.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from gradeclip_ft.models.passes import Layer, Pass, Pick
from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError, image_grid
from gradeclip_ft.models.towers.base import PassTower
from gradeclip_ft.models.towers.block import block_layer, check_blocks
from gradeclip_ft.models.towers.vit import check_patches, embed_patches
from gradeclip_ft.models.trace import patch_tokens


class CocaTower(PassTower):
    """Image tower around a VisionTransformer with an AttentionalPooler."""

    pooling = "attention pool with learned queries"

    def __init__(self, visual: Foreign) -> None:
        _check(visual)
        blocks = visual.transformer.resblocks
        check_blocks(blocks, "image tower")
        self._visual = visual
        self._layers = (*(block_layer(block) for block in blocks), _pool_layer(visual.attn_pool))
        self.width = int(visual.transformer.width)
        self.heads = self._layers[-1].heads
        self.depth = len(blocks)
        self.patch = int(visual.patch_size[0])

    def open(self, x: Float[Tensor, "B 3 H W"]) -> Pass:
        """This forward pass; behind its blocks stands the pool."""
        grid = image_grid(x, self.patch)
        tokens = embed_patches(self._visual, x, grid)
        return Pass(
            tokens,
            self._layers,
            self._head,
            None,
            patch_tokens(tokens, grid),
            grid,
            checkpointed=self._visual.transformer.grad_checkpointing,
        )

    def _head(self, rows: Tensor) -> Tensor:
        rows = self._visual.ln_post(rows)
        projected: Tensor = rows if self._visual.proj is None else rows @ self._visual.proj
        return projected


def _pool_layer(pool: Foreign) -> Layer:
    attention = pool.attn

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        y = pool.ln_k(tokens)
        if attention.in_proj_weight is None:
            weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
        else:
            weights = attention.in_proj_weight.chunk(3)
        biases = attention.in_proj_bias.chunk(3)
        q = linear(pool.ln_q(pool.query[:1]), weights[0], biases[0])
        k, v = linear(y, weights[1], biases[1]), linear(y, weights[2], biases[2])
        return q.expand(len(tokens), -1), k, v

    def finish(x: Tensor, o: Tensor) -> Tensor:
        rows: Tensor = attention.out_proj(o)
        return rows

    return Layer(
        attend, finish, attention.out_proj, attention.out_proj, int(attention.num_heads), None
    )


def _check(visual: Foreign) -> None:
    if visual.attn_pool_contrastive is not None:
        raise UnsupportedTowerError(
            f"image tower pools twice ({visual.attn_pool_type}), expected one attention pool"
        )
    if visual.pool_type != "tok":
        raise UnsupportedTowerError(
            f"image tower takes the {visual.pool_type!r} of its attention pool, expected the "
            "first query ('tok')"
        )
    check_patches(visual)
