"""Adapter: open_clip's VisionTransformer with a class token (OpenAI, LAION, DataComp, ...)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.functional import linear

from gradeclip_ft.models.tower import PassTower, image_grid, project_fused, resample_positions
from gradeclip_ft.models.trace import (
    Foreign,
    Layer,
    Pass,
    Pick,
    UnsupportedTowerError,
    class_token_query,
    patch_tokens,
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
        x = x + add(o)
        rows: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
        return rows

    def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.ndim == 3:  # the library wants one mask for every head
            mask = mask.repeat_interleave(heads, dim=0)
        rows: Tensor = block(tokens, attn_mask=mask)
        return rows

    return Layer(attend, finish, add, block.attn.out_proj, heads, run)


class VitTower(PassTower):
    """Image tower around a VisionTransformer."""

    pooling = "class token"

    def __init__(self, visual: Foreign) -> None:
        _check(visual)
        blocks = visual.transformer.resblocks
        check_blocks(blocks, "image tower")
        self._visual = visual
        self._layers = tuple(block_layer(block) for block in blocks)
        self.width = int(visual.transformer.width)
        self.heads = self._layers[-1].heads
        self.depth = len(blocks)
        self.patch = int(visual.patch_size[0])

    def open(self, x: Float[Tensor, "B 3 H W"]) -> Pass:
        """This forward pass; the query is the class token."""
        grid = image_grid(x, self.patch)
        tokens = embed_patches(self._visual, x, grid)
        query, explained = class_token_query(tokens, grid)
        return Pass(
            tokens,
            self._layers,
            self._head,
            query,
            explained,
            grid,
            checkpointed=self._visual.transformer.grad_checkpointing,
        )

    def _head(self, rows: Tensor) -> Tensor:
        rows = self._visual.ln_post(rows)
        projected: Tensor = rows if self._visual.proj is None else rows @ self._visual.proj
        return projected


def embed_patches(
    visual: Foreign, x: Float[Tensor, "B 3 H W"], grid: tuple[int, int]
) -> Float[Tensor, "B N E"]:
    """Class token and patches with their positions: the input of the first block, at any grid."""
    patches = visual.conv1(x).flatten(2).transpose(1, 2)
    first = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    positions = resample_positions(visual.positional_embedding, tuple(visual.grid_size), grid)
    rows = torch.cat([first, patches], dim=1) + positions.to(patches.dtype)
    embedded: Tensor = visual.ln_pre(rows)
    return embedded


def check_patches(visual: Foreign) -> None:
    """Refuse a tower that drops patches.

    Raises:
        UnsupportedTowerError: It does.
    """
    if not isinstance(visual.patch_dropout, nn.Identity) and visual.patch_dropout.prob > 0:
        raise UnsupportedTowerError(
            f"patch dropout is {visual.patch_dropout.prob}, expected 0: dropped tokens have no "
            "place on the grid of a heat map; load the model with patch dropout 0"
        )


def _check(visual: Foreign) -> None:
    if visual.pool_type != "tok":
        raise UnsupportedTowerError(
            f"image tower pools by {visual.pool_type!r}, expected the class token ('tok')"
        )
    check_patches(visual)


class CocaTower(PassTower):
    """Image tower around a VisionTransformer with an AttentionalPooler."""

    pooling = "attention pool with learned queries"

    def __init__(self, visual: Foreign) -> None:
        _check_coca(visual)
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


def _check_coca(visual: Foreign) -> None:
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
