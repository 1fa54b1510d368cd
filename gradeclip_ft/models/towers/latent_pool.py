"""Adapter: timm trunks pooled by a learned query (SigLIP, SigLIP 2, PE-Core), in a TimmModel.

The pool is the explained layer: its query is the same for every image, its keys are all tokens
behind the trunk's norm. There is no residual: only the rows of the pool reach the embedding.
"""

from __future__ import annotations

from jaxtyping import Float
from timm.models.eva import Eva
from torch import Tensor

from gradeclip_ft.models.passes import Layer, Pass, Pick
from gradeclip_ft.models.tower import Foreign, image_grid
from gradeclip_ft.models.towers.base import PassTower
from gradeclip_ft.models.towers.eva import block_layer as eva_layer
from gradeclip_ft.models.towers.timm_embed import check_trunk, embed_patches, refuse, rotary
from gradeclip_ft.models.towers.timm_vit import block_layer as vit_layer
from gradeclip_ft.models.towers.timm_vit import by_head
from gradeclip_ft.models.trace import patch_tokens


class LatentPoolTower(PassTower):
    """Image tower around a TimmModel whose trunk has an AttentionPoolLatent."""

    pooling = "attention pool with a learned query"

    def __init__(self, visual: Foreign) -> None:
        trunk = visual.trunk
        _check(trunk)
        self._visual, self._trunk = visual, trunk
        self.width = int(trunk.embed_dim)
        self.heads = int(trunk.attn_pool.num_heads)
        self.depth = len(trunk.blocks)
        self.patch = int(trunk.patch_embed.patch_size[0])

    def open(self, x: Float[Tensor, "B 3 H W"]) -> Pass:
        """This forward pass; behind its blocks stands the pool."""
        grid = image_grid(x, self.patch)
        trunk, rope = self._trunk, rotary(self._trunk, grid)
        if isinstance(trunk, Eva):
            layers = tuple(eva_layer(block, rope) for block in trunk.blocks)
        else:
            layers = tuple(vit_layer(block) for block in trunk.blocks)
        tokens = embed_patches(trunk, x, grid)
        return Pass(
            tokens,
            (*layers, _pool_layer(trunk)),
            self._head,
            None,
            patch_tokens(tokens, grid),
            grid,
            checkpointed=trunk.grad_checkpointing,
        )

    def _head(self, rows: Tensor) -> Tensor:
        trunk = self._trunk
        result: Tensor = self._visual.head(trunk.head(trunk.fc_norm(rows)))
        return result


def _pool_layer(trunk: Foreign) -> Layer:
    """The trunk's last norm and its pool."""
    pool, heads = trunk.attn_pool, int(trunk.attn_pool.num_heads)

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        q = by_head(pool.q(pool.latent[:, 0]), pool.q_norm, heads)
        k, v = pool.kv(trunk.norm(tokens)).chunk(2, dim=-1)
        return q.expand(len(tokens), -1), by_head(k, pool.k_norm, heads), v

    def finish(x: Tensor, o: Tensor) -> Tensor:
        rows: Tensor = pool.proj(o)
        return rows if pool.mlp is None else rows + pool.mlp(pool.norm(rows))

    return Layer(attend, finish, pool.proj, pool.proj, heads, None)


def _check(trunk: Foreign) -> None:
    check_trunk(trunk)
    pool = trunk.attn_pool
    refuse(
        {
            f"pools by {trunk.global_pool!r}": trunk.global_pool != "map",
            "pools with positions of its own": pool.pos_embed is not None,
            f"averages {pool.latent_len} learned queries": pool.latent_len > 1
            and pool.pool != "token",
        }
    )
