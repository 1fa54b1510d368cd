"""Adapter: open_clip's VisionTransformer with an attention pool (CoCa).

The explained layer is the pool; the first of its learned queries becomes the embedding, its keys
are all tokens, the class token among them.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError, image_grid
from gradeclip_ft.models.towers.block import plain_step, run_blocks
from gradeclip_ft.models.towers.vit import check_patches, embed_patches
from gradeclip_ft.models.trace import Trace, patch_tokens, trace_layer


class CocaTower:
    """Image tower around a VisionTransformer with an AttentionalPooler."""

    pooling = "attention pool with learned queries"
    unexplained: str | None = None

    def __init__(self, visual: Foreign) -> None:
        _check(visual)
        self._visual, self._pool = visual, visual.attn_pool
        self.width = int(visual.transformer.width)
        self.heads = int(visual.attn_pool.attn.num_heads)
        self.depth = len(visual.transformer.resblocks)
        self.patch = int(visual.patch_size[0])

    def encode(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Embeddings F_I, not normalised, equal to `encode_image(..., normalize=False)`."""
        return self.trace(x).embedding

    def trace(self, x: Float[Tensor, "B 3 H W"]) -> Trace:
        """The pool of this forward pass."""
        grid = image_grid(x, self.patch)
        transformer = self._visual.transformer
        tokens = run_blocks(
            transformer.resblocks,
            embed_patches(self._visual, x, grid),
            plain_step,
            checkpointed=transformer.grad_checkpointing,
        )
        return trace_layer(
            tokens,
            None,
            attend=self._attend,
            finish=self._finish,
            project=self._pool.attn.out_proj,
            heads=self.heads,
            explained=patch_tokens(tokens, grid),
            grid=grid,
        )

    def _attend(self, tokens: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        attention, y = self._pool.attn, self._pool.ln_k(tokens)
        if attention.in_proj_weight is None:
            weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
        else:
            weights = attention.in_proj_weight.chunk(3)
        biases = attention.in_proj_bias.chunk(3)
        q = linear(self._pool.ln_q(self._pool.query[:1]), weights[0], biases[0])
        k, v = linear(y, weights[1], biases[1]), linear(y, weights[2], biases[2])
        return q.expand(len(tokens), -1), k, v

    def _finish(self, x: Tensor, o: Tensor) -> Tensor:
        pooled = self._visual.ln_post(self._pool.attn.out_proj(o))
        result: Tensor = pooled if self._visual.proj is None else pooled @ self._visual.proj
        return result


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
