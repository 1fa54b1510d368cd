"""Adapter: CLIP's ResNet with attention pooling (RN50, RN101, RN50x4, ...).

The explained layer is the pool: the query is the mean of the feature map, behind attention comes
one linear map and nothing else.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.tower import Foreign, image_grid
from gradeclip_ft.models.trace import Trace, class_token_query, query_rows, trace_layer
from gradeclip_ft.ops.positions import resample_positions

STRIDE = 32


class ResNetTower:
    """Image tower around a ModifiedResNet."""

    pooling = "attention pool over the feature map's mean"
    unexplained: str | None = None
    depth = 4

    def __init__(self, visual: Foreign) -> None:
        self._visual, self._pool = visual, visual.attnpool
        self.width = int(visual.attnpool.q_proj.in_features)
        self.heads = int(visual.attnpool.num_heads)
        self.patch = STRIDE

    def encode(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Embeddings F_I, not normalised, equal to `encode_image`."""
        return self.trace(x).embedding

    def trace(self, x: Float[Tensor, "B 3 H W"]) -> Trace:
        """The pool of this forward pass; the query is the mean token."""
        grid = image_grid(x, self.patch)
        visual = self._visual
        features = visual.stem(x)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            features = layer(features)
        cells = features.flatten(2).transpose(1, 2)  # (B, h·w, C)
        tokens = torch.cat([cells.mean(1, keepdim=True), cells], dim=1)
        tokens = tokens + self._positions(grid).to(tokens.dtype)
        query, explained = class_token_query(tokens, grid)
        return trace_layer(
            tokens,
            query,
            attend=self._attend,
            finish=self._finish,
            project=self._pool.c_proj,
            heads=self.heads,
            explained=explained,
            grid=grid,
        )

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        table: Tensor = self._pool.positional_embedding
        side = self._visual.image_size
        native = (side, side) if isinstance(side, int) else tuple(side)
        return resample_positions(table, (native[0] // STRIDE, native[1] // STRIDE), grid)

    def _attend(self, tokens: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        pool = self._pool
        return pool.q_proj(query_rows(tokens, query)), pool.k_proj(tokens), pool.v_proj(tokens)

    def _finish(self, x: Tensor, o: Tensor) -> Tensor:
        result: Tensor = self._pool.c_proj(o)
        return result
