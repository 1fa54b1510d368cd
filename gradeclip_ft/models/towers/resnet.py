"""Adapter: CLIP's ResNet with attention pooling (RN50, RN101, RN50x4, ...).

The explained layer is the pool: the query is the mean of the feature map, behind attention comes
one linear map and nothing else.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.architecture import pair
from gradeclip_ft.models.tower import PassTower, image_grid, resample_positions
from gradeclip_ft.models.trace import Foreign, Layer, Pass, Pick, class_token_query

STRIDE = 32


class ResNetTower(PassTower):
    """Image tower around a ModifiedResNet."""

    pooling = "attention pool over the feature map's mean"
    depth = 4

    def __init__(self, visual: Foreign) -> None:
        self._visual, self._pool = visual, visual.attnpool
        self._layer = _pool_layer(visual.attnpool)
        self.width = int(visual.attnpool.q_proj.in_features)
        self.heads = self._layer.heads
        self.patch = STRIDE

    def open(self, x: Float[Tensor, "B 3 H W"]) -> Pass:
        """This forward pass behind its convolutions: the pool; the query is the mean token."""
        grid = image_grid(x, self.patch)
        visual = self._visual
        features = visual.stem(x)
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            features = stage(features)
        cells = features.flatten(2).transpose(1, 2)  # (B, h·w, C)
        tokens = torch.cat([cells.mean(1, keepdim=True), cells], dim=1)
        tokens = tokens + self._positions(grid).to(tokens.dtype)
        query, explained = class_token_query(tokens, grid)
        return Pass(tokens, (self._layer,), _as_it_is, query, explained, grid)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        table: Tensor = self._pool.positional_embedding
        height, width = pair(self._visual.image_size)
        return resample_positions(table, (height // STRIDE, width // STRIDE), grid)


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


def _pool_layer(pool: Foreign) -> Layer:
    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        return pool.q_proj(pick(tokens)), pool.k_proj(tokens), pool.v_proj(tokens)

    def finish(x: Tensor, o: Tensor) -> Tensor:
        rows: Tensor = pool.c_proj(o)
        return rows

    return Layer(attend, finish, pool.c_proj, pool.c_proj, int(pool.num_heads), None)
