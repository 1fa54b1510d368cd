"""Adapter: timm trunks pooled by a learned query (SigLIP, SigLIP 2, PE-Core), in a TimmModel.

The pool is the explained layer: its query is the same for every image, its keys are all tokens
behind the trunk's norm. There is no residual: only the rows of the pool reach the embedding.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.tower import Foreign, image_grid
from gradeclip_ft.models.towers.block import run_blocks
from gradeclip_ft.models.towers.timm_embed import check_trunk, embed_patches, refuse, rotary
from gradeclip_ft.models.towers.timm_vit import by_head
from gradeclip_ft.models.trace import Trace, patch_tokens, trace_layer


class LatentPoolTower:
    """Image tower around a TimmModel whose trunk has an AttentionPoolLatent."""

    pooling = "attention pool with a learned query"
    unexplained: str | None = None

    def __init__(self, visual: Foreign) -> None:
        trunk = visual.trunk
        _check(trunk)
        self._visual, self._trunk, self._pool = visual, trunk, trunk.attn_pool
        self.width = int(trunk.embed_dim)
        self.heads = int(trunk.attn_pool.num_heads)
        self.depth = len(trunk.blocks)
        self.patch = int(trunk.patch_embed.patch_size[0])

    def encode(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Embeddings F_I, not normalised, equal to `encode_image`."""
        return self.trace(x).embedding

    def trace(self, x: Float[Tensor, "B 3 H W"]) -> Trace:
        """The pool of this forward pass."""
        grid = image_grid(x, self.patch)
        trunk, rope = self._trunk, rotary(self._trunk, grid)

        def step(block: Foreign, rows: Tensor) -> Tensor:
            result: Tensor = block(rows) if rope is None else block(rows, rope=rope)
            return result

        tokens = trunk.norm(
            run_blocks(
                trunk.blocks,
                embed_patches(trunk, x, grid),
                step,
                checkpointed=trunk.grad_checkpointing,
            )
        )
        return trace_layer(
            tokens,
            None,
            attend=self._attend,
            finish=self._finish,
            project=self._pool.proj,
            heads=self.heads,
            explained=patch_tokens(tokens, grid),
            grid=grid,
        )

    def _attend(self, tokens: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        pool = self._pool
        q = by_head(pool.q(pool.latent[:, 0]), pool.q_norm, self.heads)
        k, v = pool.kv(tokens).chunk(2, dim=-1)
        return q.expand(len(tokens), -1), by_head(k, pool.k_norm, self.heads), v

    def _finish(self, x: Tensor, o: Tensor) -> Tensor:
        pool, trunk = self._pool, self._trunk
        pooled = pool.proj(o)
        if pool.mlp is not None:
            pooled = pooled + pool.mlp(pool.norm(pooled))
        result: Tensor = self._visual.head(trunk.head(trunk.fc_norm(pooled)))
        return result


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
