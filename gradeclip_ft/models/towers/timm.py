"""What comes before the first block of a timm transformer, at any grid."""

from __future__ import annotations

from copy import deepcopy

import torch
from jaxtyping import Float
from timm.layers.attention import Attention
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
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


def embed_patches(
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
        table = resample_positions(trunk.pos_embed[0], native_grid(trunk), grid)
        if trunk.no_embed_class:
            rows = torch.cat([*first, patches + table], dim=1)
        else:
            rows = torch.cat([*first, patches], dim=1) + table
    embedded: Tensor = trunk.norm_pre(trunk.pos_drop(rows))
    return embedded


def native_grid(trunk: Foreign) -> tuple[int, int]:
    """(h, w) of the grid that the trunk's position embeddings are for."""
    height, width = trunk.patch_embed.grid_size
    return int(height), int(width)


def rotary(trunk: Foreign, grid: tuple[int, int]) -> Tensor | None:
    """Rotary position embedding of the patches; None where the trunk has none."""
    rope = getattr(trunk, "rope", None)
    if rope is None:
        return None
    if grid != native_grid(trunk):
        rope = deepcopy(rope)  # it remembers one grid; the model's own stays as it is
        rope.update_feat_shape(list(grid))
    embedding: Tensor = rope.get_embed()
    return embedding


def check_trunk(trunk: Foreign) -> None:
    """Refuse what would make the embedded patches wrong.

    Raises:
        UnsupportedTowerError: Patches are dropped, or positions change with the layer.
    """
    patch_drop = getattr(trunk, "patch_drop", None)
    problems = {
        "has no patch embedding": not hasattr(trunk, "patch_embed"),
        "drops patches": patch_drop is not None and not isinstance(patch_drop, nn.Identity),
        "has a second class token, of a distillation": hasattr(trunk, "dist_token"),
        "mixes rotary positions by depth": bool(getattr(trunk, "rope_mixed", False)),
    }
    refuse(problems)


def refuse(problems: dict[str, bool]) -> None:
    """Raise for the first problem that is present.

    Raises:
        UnsupportedTowerError: One is.
    """
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise UnsupportedTowerError(f"image tower {found[0]}")


class TimmVitTower(PassTower):
    """Image tower around a TimmModel whose trunk is a VisionTransformer with a class token."""

    pooling = "class token"

    def __init__(self, visual: Foreign) -> None:
        trunk = visual.trunk
        _check_timm_vit(trunk)
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


def _check_timm_vit(trunk: Foreign) -> None:
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


class EvaTower(PassTower):
    """Image tower around a TimmModel whose trunk is an Eva with a class token."""

    pooling = "class token"

    def __init__(self, visual: Foreign) -> None:
        trunk = visual.trunk
        _check_eva(trunk)
        self._visual, self._trunk = visual, trunk
        self.width = int(trunk.embed_dim)
        self.heads = int(trunk.blocks[-1].attn.num_heads)
        self.depth = len(trunk.blocks)
        self.patch = int(trunk.patch_embed.patch_size[0])

    def open(self, x: Float[Tensor, "B 3 H W"]) -> Pass:
        """This forward pass; the query is the class token."""
        grid = image_grid(x, self.patch)
        rope = rotary(self._trunk, grid)
        tokens = embed_patches(self._trunk, x, grid)
        query, explained = class_token_query(tokens, grid)
        return Pass(
            tokens,
            tuple(eva_block_layer(block, rope) for block in self._trunk.blocks),
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


def eva_block_layer(block: Foreign, rope: Tensor | None) -> Layer:
    """EVA's block as a layer at one grid, pre-norm or post-norm."""
    attention, post_norm = block.attn, isinstance(block, EvaBlockPostNorm)

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        y = tokens if post_norm else block.norm1(tokens)
        q, k, v = _project(attention, pick(y), y)
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

    def finish(x: Tensor, o: Tensor) -> Tensor:
        x = x + add(o)
        if post_norm:
            mixed = block.norm2(block.mlp(x))
        else:
            mixed = block.mlp(block.norm2(x))
            mixed = mixed if block.gamma_2 is None else block.gamma_2 * mixed
        rows: Tensor = x + mixed
        return rows

    def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
        rows: Tensor = block(tokens, rope=rope)
        return rows

    return Layer(attend, finish, add, attention.proj, int(attention.num_heads), run)


def _project(attention: Foreign, row: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q of some rows, k and v of all; projections fused or not, keys without bias."""
    if attention.qkv is None:
        return attention.q_proj(row), attention.k_proj(y), attention.v_proj(y)
    weights = attention.qkv.weight.chunk(3)
    q = linear(row, weights[0], attention.q_bias)
    return q, linear(y, weights[1]), linear(y, weights[2], attention.v_bias)


def _rotate(k: Tensor, rope: Tensor, attention: Foreign) -> Tensor:
    """Rotary positions on all rows behind the class token, head by head."""
    heads, first = attention.num_heads, attention.num_prefix_tokens
    split = k.view(*k.shape[:2], heads, k.shape[2] // heads).transpose(1, 2)  # (B, A, N, c)
    rotated = apply_rot_embed_cat(split[:, :, first:], rope, half=attention.rotate_half)
    joined = torch.cat([split[:, :, :first], rotated.to(split.dtype)], dim=2)
    return joined.transpose(1, 2).flatten(2)


def _check_eva(trunk: Foreign) -> None:
    check_trunk(trunk)
    block = trunk.blocks[-1]
    attention = block.attn
    refuse(
        {
            f"pools by {trunk.global_pool!r}": trunk.global_pool != "token",
            f"has {type(block).__name__} blocks": not isinstance(
                block, EvaBlock | EvaBlockPostNorm
            ),
            f"has {type(attention).__name__}": not isinstance(attention, EvaAttention),
            "gates its attention": getattr(attention, "gate", None) is not None,
            "normalises queries and keys": not isinstance(
                getattr(attention, "q_norm", None), nn.Identity
            ),
        }
    )


class LatentPoolTower(PassTower):
    """Image tower around a TimmModel whose trunk has an AttentionPoolLatent."""

    pooling = "attention pool with a learned query"

    def __init__(self, visual: Foreign) -> None:
        trunk = visual.trunk
        _check_latent_pool(trunk)
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
            layers = tuple(eva_block_layer(block, rope) for block in trunk.blocks)
        else:
            layers = tuple(block_layer(block) for block in trunk.blocks)
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


def _check_latent_pool(trunk: Foreign) -> None:
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
