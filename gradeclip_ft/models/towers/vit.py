"""Adapter: open_clip's VisionTransformer (OpenAI, LAION, DataComp, ...), also CoCa's."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Float
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.functional import linear

from gradeclip_ft.models.tower import (
    Tower,
    embed_patches,
    image_grid,
    image_pass,
    project_fused,
    refuse_tower,
    residual_layer,
)
from gradeclip_ft.models.trace import Foreign, Layer, Pass, Pick, UnsupportedTowerError


def vit_tower(visual: Foreign) -> Tower:
    """The tower around a VisionTransformer: its class token, or CoCa's pool after the blocks.

    Raises:
        UnsupportedTowerError: It has a part that is not reproduced.
    """
    pool, drop = visual.attn_pool, visual.patch_dropout
    # Dropped tokens have no place on the grid of a heat map.
    drops = not isinstance(drop, nn.Identity) and drop.prob > 0
    twice = pool is not None and visual.attn_pool_contrastive is not None
    refuse_tower(
        "image tower",
        {
            "pools twice, expected one attention pool": twice,
            f"pools by {visual.pool_type!r}, expected the first token": visual.pool_type != "tok",
            "drops patches in training; load the model with patch dropout 0": drops,
        },
    )
    blocks = visual.transformer.resblocks
    check_blocks(blocks, "image tower")
    layers = tuple(block_layer(block) for block in blocks)
    if pool is not None:
        layers = (*layers, _pool_layer(pool))
    patch = int(visual.patch_size[0])

    def head(rows: Tensor) -> Tensor:
        rows = visual.ln_post(rows)
        projected: Tensor = rows if visual.proj is None else rows @ visual.proj
        return projected

    def open_pass(x: Float[Tensor, "B 3 H W"]) -> Pass:
        grid, table = image_grid(x, patch), visual.positional_embedding
        tokens = embed_patches(
            x, visual.conv1, visual.class_embedding, table, tuple(visual.grid_size), grid
        )
        return image_pass(
            visual.ln_pre(tokens),
            layers,
            head,
            grid,
            learned_query=pool is not None,
            checkpointed=visual.transformer.grad_checkpointing,
        )

    return Tower(
        open_pass,
        width=int(visual.transformer.width),
        heads=layers[-1].heads,
        depth=len(blocks),
        pooling="class token" if pool is None else "attention pool with learned queries",
        patch=patch,
    )


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
    attention = block.attn
    heads = int(attention.num_heads)

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        return project_fused(block.ln_1(tokens), pick, weight, bias)

    def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.ndim == 3:  # the library wants one mask for every head
            mask = mask.repeat_interleave(heads, dim=0)  # (B·A, N, N)
        rows: Tensor = block(tokens, attn_mask=mask)
        return rows

    return residual_layer(
        attend,
        add=lambda o: block.ls_1(attention.out_proj(o)),
        mix=lambda x: block.ls_2(block.mlp(block.ln_2(x))),
        project=attention.out_proj,
        heads=heads,
        run=run,
    )


def _pool_layer(pool: Foreign) -> Layer:
    """CoCa's AttentionalPooler; its first query becomes the embedding."""
    attention = pool.attn

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        y = pool.ln_k(tokens)
        if attention.in_proj_weight is None:  # queries and keys of different widths
            weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
        else:
            weights = attention.in_proj_weight.chunk(3)
        biases = attention.in_proj_bias.chunk(3)
        # `pick` is not asked: the query is a parameter, the same for every image. The pool's other
        # queries feed the captioning decoder and never reach the contrastive embedding.
        q = linear(pool.ln_q(pool.query[:1]), weights[0], biases[0])  # (1, C)
        k, v = linear(y, weights[1], biases[1]), linear(y, weights[2], biases[2])
        return q.expand(len(tokens), -1), k, v

    project = attention.out_proj
    # No residual: a pool's input is not its query.
    return Layer(attend, lambda x, o: project(o), project, project, int(attention.num_heads), None)
