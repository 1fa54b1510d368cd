"""Adapter: open_clip's VisionTransformer with a class token (OpenAI, LAION, DataComp, ...)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError, image_grid
from gradeclip_ft.models.towers import block as parts
from gradeclip_ft.models.trace import Trace, class_token_query, trace_layer
from gradeclip_ft.ops.positions import resample_positions


class VitTower:
    """Image tower around a VisionTransformer."""

    pooling = "class token"
    unexplained: str | None = None

    def __init__(self, visual: Foreign) -> None:
        _check(visual)
        parts.check_blocks(visual.transformer.resblocks, "image tower")
        self._visual = visual
        self._last = visual.transformer.resblocks[-1]
        self.width = int(visual.transformer.width)
        self.heads = int(self._last.attn.num_heads)
        self.depth = len(visual.transformer.resblocks)
        self.patch = int(visual.patch_size[0])

    def encode(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Embeddings F_I, not normalised, equal to `encode_image`."""
        return self.trace(x).embedding

    def trace(self, x: Float[Tensor, "B 3 H W"]) -> Trace:
        """The last layer of this forward pass; the query is the class token."""
        grid = image_grid(x, self.patch)
        transformer = self._visual.transformer
        tokens = parts.run_blocks(
            transformer.resblocks[:-1],
            embed_patches(self._visual, x, grid),
            parts.plain_step,
            checkpointed=transformer.grad_checkpointing,
        )
        query, explained = class_token_query(tokens, grid)
        return trace_layer(
            tokens,
            query,
            attend=self._attend,
            finish=self._finish,
            project=self._last.attn.out_proj,
            heads=self.heads,
            explained=explained,
            grid=grid,
        )

    def _attend(self, tokens: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return parts.query_key_value(self._last, tokens, query)

    def _finish(self, x: Tensor, o: Tensor) -> Tensor:
        x = self._visual.ln_post(parts.behind_attention(self._last, x, o))
        projected: Tensor = x if self._visual.proj is None else x @ self._visual.proj
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
