"""Adapter: open_clip's VisionTransformer with a class token (OpenAI, LAION, DataComp, ...)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradeclip_ft.models.passes import Pass
from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError, image_grid
from gradeclip_ft.models.towers.base import PassTower
from gradeclip_ft.models.towers.block import block_layer, check_blocks
from gradeclip_ft.models.trace import class_token_query
from gradeclip_ft.ops.positions import resample_positions


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
