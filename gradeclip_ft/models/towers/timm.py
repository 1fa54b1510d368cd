"""Adapter: timm's transformers inside open_clip: EVA, DINOv2, SigLIP, PE, and plain ViTs."""

from __future__ import annotations

from copy import deepcopy

import torch
from jaxtyping import Float
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import linear

from gradeclip_ft.models.tower import (
    Tower,
    image_grid,
    image_pass,
    project_fused,
    refuse_tower,
    resample_positions,
    residual_layer,
)
from gradeclip_ft.models.trace import Foreign, Layer, Pass, Pick, UnsupportedTowerError


def trunk_tower(visual: Foreign) -> Tower:
    """The tower around a trunk of timm with a head after it: class token, or a latent pool.

    Raises:
        UnsupportedTowerError: The trunk has a part that is not reproduced.
    """
    trunk = visual.trunk
    pool: Foreign = getattr(trunk, "attn_pool", None)
    pooled = isinstance(pool, AttentionPoolLatent)
    if not pooled and not isinstance(trunk, Eva | VisionTransformer):
        raise UnsupportedTowerError(f"image tower is timm's {type(trunk).__name__}")
    _check(trunk, pooled=pooled)
    last = pool if pooled else trunk.blocks[-1].attn
    patch = int(trunk.patch_embed.patch_size[0])
    plain = () if isinstance(trunk, Eva) else tuple(_block_layer(block) for block in trunk.blocks)

    def head(rows: Tensor) -> Tensor:
        # A pool reads normed tokens, so there the trunk's last norm comes before attention.
        rows = rows if pooled else trunk.norm(rows)
        embeddings: Tensor = visual.head(trunk.head(trunk.fc_norm(rows)))
        return embeddings

    def open_pass(x: Float[Tensor, "B 3 H W"]) -> Pass:
        grid = image_grid(x, patch)
        blocks = plain
        if isinstance(trunk, Eva):  # made anew for each pass: the rotation belongs to its grid
            rope = _rotary(trunk, grid)
            blocks = tuple(_eva_layer(block, rope) for block in trunk.blocks)
        return image_pass(
            _embed(trunk, x, grid),
            (*blocks, _pool_layer(trunk)) if pooled else blocks,
            head,
            grid,
            learned_query=pooled,
            checkpointed=trunk.grad_checkpointing,
        )

    return Tower(
        open_pass,
        width=int(trunk.embed_dim),
        heads=int(last.num_heads),
        depth=len(trunk.blocks),
        pooling="attention pool with a learned query" if pooled else "class token",
        patch=patch,
    )


def _embed(
    trunk: Foreign, x: Float[Tensor, "B 3 H W"], grid: tuple[int, int]
) -> Float[Tensor, "B N E"]:
    """Class token, registers and patches with their positions: the input of the first block."""
    patches = trunk.patch_embed.norm(trunk.patch_embed.proj(x).flatten(2).transpose(1, 2))
    first = [
        token.expand(len(patches), -1, -1)
        for token in (trunk.cls_token, trunk.reg_token)
        if token is not None
    ]
    if trunk.pos_embed is None:
        rows = torch.cat([*first, patches], dim=1)
    else:
        table = resample_positions(trunk.pos_embed[0], _native_grid(trunk), grid)
        if trunk.no_embed_class:  # the table has rows for patches alone, (h·w, E)
            rows = torch.cat([*first, patches + table], dim=1)
        else:
            rows = torch.cat([*first, patches], dim=1) + table
    embedded: Tensor = trunk.norm_pre(trunk.pos_drop(rows))
    return embedded


def _native_grid(trunk: Foreign) -> tuple[int, int]:
    """(h, w) of the grid that the trunk's position embeddings are for."""
    height, width = trunk.patch_embed.grid_size
    return int(height), int(width)


def _rotary(trunk: Foreign, grid: tuple[int, int]) -> Tensor | None:
    """Rotary position embedding of the patches; None where the trunk has none."""
    rope = getattr(trunk, "rope", None)
    if rope is None:
        return None
    if grid != _native_grid(trunk):
        rope = deepcopy(rope)  # it remembers one grid; the model's own stays as it is
        rope.update_feat_shape(list(grid))
    embedding: Tensor = rope.get_embed()
    return embedding


def _block_layer(block: Foreign) -> Layer:
    """Timm's block as a layer; pre-norm, with or without layer scale."""
    attention, heads = block.attn, int(block.attn.num_heads)

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = attention.qkv.weight, attention.qkv.bias
        q, k, v = project_fused(block.norm1(tokens), pick, weight, bias)
        return _by_head(q, attention.q_norm, heads), _by_head(k, attention.k_norm, heads), v

    return residual_layer(
        attend,
        add=lambda o: block.ls1(attention.proj(attention.norm(o))),
        mix=lambda x: block.ls2(block.mlp(block.norm2(x))),
        project=attention.proj,
        heads=heads,
        run=lambda tokens, mask: block(tokens),
    )


def _by_head(x: Tensor, norm: Foreign, heads: int) -> Tensor:
    """A norm over the channels of every head; heads joined before and after."""
    split = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    normed: Tensor = norm(split).flatten(-2)
    return normed


def _eva_layer(block: Foreign, rope: Tensor | None) -> Layer:
    """EVA's block as a layer at one grid, pre-norm or post-norm."""
    attention, post_norm = block.attn, isinstance(block, EvaBlockPostNorm)

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        y = tokens if post_norm else block.norm1(tokens)
        row = pick(y)
        # Projections fused or apart; EVA's keys have no bias, which a softmax would not see.
        if attention.qkv is None:
            q, k, v = attention.q_proj(row), attention.k_proj(y), attention.v_proj(y)
        else:
            weights = attention.qkv.weight.chunk(3)
            q = linear(row, weights[0], attention.q_bias)
            k, v = linear(y, weights[1]), linear(y, weights[2], attention.v_bias)
        if rope is not None:
            every = q.ndim == 3  # a single query is that of the class token, which has no position
            q = _rotate(q, rope, attention).to(v.dtype) if every else q
            k = _rotate(k, rope, attention).to(v.dtype)
        return q, k, v

    def add(o: Tensor) -> Tensor:
        attended: Tensor = attention.proj(attention.norm(o))
        if post_norm:
            attended = block.norm1(attended)
        elif block.gamma_1 is not None:
            attended = block.gamma_1 * attended
        return attended

    def mix(x: Tensor) -> Tensor:
        mixed: Tensor = block.norm2(block.mlp(x)) if post_norm else block.mlp(block.norm2(x))
        return mixed if post_norm or block.gamma_2 is None else block.gamma_2 * mixed

    return residual_layer(
        attend,
        add,
        mix,
        project=attention.proj,
        heads=int(attention.num_heads),
        run=lambda tokens, mask: block(tokens, rope=rope),
    )


def _rotate(k: Tensor, rope: Tensor, attention: Foreign) -> Tensor:
    """Rotary positions on all rows after the class token, head by head."""
    heads, first = attention.num_heads, attention.num_prefix_tokens
    split = k.view(*k.shape[:2], heads, k.shape[2] // heads).transpose(1, 2)  # (B, A, N, c)
    rotated = apply_rot_embed_cat(split[:, :, first:], rope, half=attention.rotate_half)
    joined = torch.cat([split[:, :, :first], rotated.to(split.dtype)], dim=2)
    return joined.transpose(1, 2).flatten(2)  # heads joined again: (B, N, C)


def _pool_layer(trunk: Foreign) -> Layer:
    """The trunk's last norm and its pool, whose query is a parameter."""
    pool, heads = trunk.attn_pool, int(trunk.attn_pool.num_heads)

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        q = _by_head(pool.q(pool.latent[:, 0]), pool.q_norm, heads)  # (1, C), for every image
        k, v = pool.kv(trunk.norm(tokens)).chunk(2, dim=-1)
        return q.expand(len(tokens), -1), _by_head(k, pool.k_norm, heads), v

    def finish(x: Tensor, o: Tensor) -> Tensor:
        # No residual around attention: the input rows x are not the query.
        rows: Tensor = pool.proj(o)
        return rows if pool.mlp is None else rows + pool.mlp(pool.norm(rows))

    return Layer(attend, finish, pool.proj, pool.proj, heads, None)


def _check(trunk: Foreign, *, pooled: bool) -> None:
    """Refuse what would make the embedded patches, the last layer or the query wrong."""
    drop = getattr(trunk, "patch_drop", None)
    problems = {
        "has no patch embedding": not hasattr(trunk, "patch_embed"),
        "drops patches": drop is not None and not isinstance(drop, nn.Identity),
        "has a second class token, of a distillation": hasattr(trunk, "dist_token"),
        "mixes rotary positions by depth": bool(getattr(trunk, "rope_mixed", False)),
        f"pools by {trunk.global_pool!r}": trunk.global_pool != ("map" if pooled else "token"),
    }
    if pooled:
        pool = trunk.attn_pool
        problems |= {
            "pools with positions of its own": pool.pos_embed is not None,
            f"averages {pool.latent_len} learned queries": pool.latent_len > 1
            and pool.pool != "token",
        }
    else:
        block, attention = trunk.blocks[-1], trunk.blocks[-1].attn
        eva = isinstance(trunk, Eva)
        known = isinstance(block, EvaBlock | EvaBlockPostNorm) if eva else type(block) is Block
        plain = isinstance(attention, EvaAttention) if eva else type(attention) is Attention
        problems |= {
            f"has {type(block).__name__} blocks": not known,
            f"has {type(attention).__name__}": not plain,
            "gates its attention": getattr(attention, "gate", None) is not None,
            "normalises queries and keys": eva
            and not isinstance(getattr(attention, "q_norm", None), nn.Identity),
        }
    refuse_tower("image tower", problems)
