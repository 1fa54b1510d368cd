"""Adapter: CLIP's ResNet with attention pooling (RN50, RN101, RN50x4, ...).

The explained layer is the pool: the query is the mean of the feature map, and after attention comes
one linear map and nothing else.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.architecture import pair
from gradeclip_ft.models.tower import Tower, image_grid, image_pass, resample_positions
from gradeclip_ft.models.trace import Foreign, Layer, Pass, Pick

STRIDE = 32


def resnet_tower(visual: Foreign) -> Tower:
    """The tower around a ModifiedResNet."""
    pool = visual.attnpool

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        return pool.q_proj(pick(tokens)), pool.k_proj(tokens), pool.v_proj(tokens)

    project = pool.c_proj
    layer = Layer(attend, lambda x, o: project(o), project, project, int(pool.num_heads), None)

    def open_pass(x: Float[Tensor, "B 3 H W"]) -> Pass:
        grid = image_grid(x, STRIDE)
        features = visual.stem(x)
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            features = stage(features)
        cells = features.flatten(2).transpose(1, 2)  # (B, h·w, C)
        # The mean comes first, where the table of positions has its leading row.
        tokens = torch.cat([cells.mean(1, keepdim=True), cells], dim=1)
        height, width = pair(visual.image_size)
        native = (height // STRIDE, width // STRIDE)
        positions = resample_positions(pool.positional_embedding, native, grid)
        # There is no head: the pool's projection already gives the embedding.
        return image_pass(tokens + positions.to(tokens.dtype), (layer,), lambda rows: rows, grid)

    return Tower(
        open_pass,
        width=int(pool.q_proj.in_features),
        heads=layer.heads,
        depth=4,
        pooling="attention pool over the feature map's mean",
        patch=STRIDE,
    )
