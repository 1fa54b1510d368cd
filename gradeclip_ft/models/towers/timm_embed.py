"""What comes before the first block of a timm transformer, at any grid."""

from __future__ import annotations

from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError
from gradeclip_ft.ops.positions import resample_positions


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
