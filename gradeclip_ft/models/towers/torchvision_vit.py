"""Adapter: torchvision's VisionTransformer, a classifier with a class token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.passes import Layer, Pass, Pick
from gradeclip_ft.models.tower import Foreign, image_grid
from gradeclip_ft.models.towers.base import PassTower
from gradeclip_ft.models.towers.fused import project_fused
from gradeclip_ft.models.trace import class_token_query
from gradeclip_ft.ops.positions import resample_positions


class TorchvisionVitTower(PassTower):
    """Image tower around a VisionTransformer of torchvision; its embedding is the class logits."""

    pooling = "class token"

    def __init__(self, model: Foreign) -> None:
        self._model = model
        self._layers = tuple(_layer(block) for block in model.encoder.layers)
        self.width = int(model.hidden_dim)
        self.heads = self._layers[-1].heads
        self.depth = len(self._layers)
        self.patch = int(model.patch_size)

    def open(self, x: Float[Tensor, "B 3 H W"]) -> Pass:
        """This forward pass, at any grid; the query is the class token."""
        grid, model = image_grid(x, self.patch), self._model
        patches = model.conv_proj(x).flatten(2).transpose(1, 2)
        side = model.image_size // self.patch
        positions = resample_positions(model.encoder.pos_embedding[0], (side, side), grid)
        first = model.class_token.expand(len(x), -1, -1)
        tokens = model.encoder.dropout(torch.cat([first, patches], dim=1) + positions)
        query, explained = class_token_query(tokens, grid)
        return Pass(tokens, self._layers, self._head, query, explained, grid)

    def _head(self, rows: Tensor) -> Tensor:
        logits: Tensor = self._model.heads(self._model.encoder.ln(rows))
        return logits


def _layer(block: Foreign) -> Layer:
    """A pre-norm block around torch's MultiheadAttention."""
    attention = block.self_attention

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        return project_fused(block.ln_1(tokens), pick, weight, bias)

    def add(o: Tensor) -> Tensor:
        added: Tensor = block.dropout(attention.out_proj(o))
        return added

    def finish(x: Tensor, o: Tensor) -> Tensor:
        x = x + add(o)
        rows: Tensor = x + block.mlp(block.ln_2(x))
        return rows

    def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
        rows: Tensor = block(tokens)
        return rows

    return Layer(attend, finish, add, attention.out_proj, int(attention.num_heads), run)
