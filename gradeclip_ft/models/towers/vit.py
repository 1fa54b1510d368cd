"""Adapter: open_clip's VisionTransformer (OpenAI, LAION, DataComp, ...), also CoCa's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.functional import linear

from gradeclip_ft.models.tower import (
    Tower,
    image_grid,
    image_pass,
    project_fused,
    refuse_tower,
    resample_positions,
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
        grid = image_grid(x, patch)
        return image_pass(
            _embed(visual, x, grid),
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
    heads = int(block.attn.num_heads)

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        return project_fused(block.ln_1(tokens), pick, weight, bias)

    def add(o: Tensor) -> Tensor:
        added: Tensor = block.ls_1(block.attn.out_proj(o))
        return added

    def finish(x: Tensor, o: Tensor) -> Tensor:
        # Row by row, so it takes one query row (B, W) as well as all patches (B, N, W).
        x = x + add(o)
        rows: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
        return rows

    def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.ndim == 3:  # the library wants one mask for every head
            mask = mask.repeat_interleave(heads, dim=0)  # (B·A, N, N)
        rows: Tensor = block(tokens, attn_mask=mask)
        return rows

    return Layer(attend, finish, add, block.attn.out_proj, heads, run)


def _embed(
    visual: Foreign, x: Float[Tensor, "B 3 H W"], grid: tuple[int, int]
) -> Float[Tensor, "B N E"]:
    """Class token and patches with their positions: the input of the first block, at any grid."""
    patches = visual.conv1(x).flatten(2).transpose(1, 2)  # (B, h·w, E)
    # Under autocast the convolution gives bf16 while parameters are fp32; the library casts these
    # two to the dtype of the patches, and so must we to stay equal to it.
    first = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    positions = resample_positions(visual.positional_embedding, tuple(visual.grid_size), grid)
    rows = torch.cat([first, patches], dim=1) + positions.to(patches.dtype)
    embedded: Tensor = visual.ln_pre(rows)
    return embedded


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

    def finish(x: Tensor, o: Tensor) -> Tensor:
        rows: Tensor = attention.out_proj(o)  # no residual: a pool's input is not its query
        return rows

    project = attention.out_proj
    return Layer(attend, finish, project, project, int(attention.num_heads), None)
