"""Adapter: BLIP's image encoder under its contrastive head (Hugging Face transformers)."""

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


class BlipVisionTower(PassTower):
    """Image tower of a BlipForImageTextRetrieval: the class token, normed and projected."""

    pooling = "class token"

    def __init__(self, model: Foreign) -> None:
        self._model, vision = model, model.vision_model
        self._layers = tuple(_layer(layer) for layer in vision.encoder.layers)
        self.width = int(vision.embeddings.embed_dim)
        self.heads = self._layers[-1].heads
        self.depth = len(self._layers)
        self.patch = int(vision.embeddings.patch_size)

    def open(self, x: Float[Tensor, "B 3 H W"]) -> Pass:
        """This forward pass, at any grid; the query is the class token."""
        grid, parts = image_grid(x, self.patch), self._model.vision_model.embeddings
        patches = parts.patch_embedding(x).flatten(2).transpose(1, 2)
        side = parts.image_size // self.patch
        positions = resample_positions(parts.position_embedding[0], (side, side), grid)
        first = parts.class_embedding.expand(len(x), -1, -1)
        tokens = torch.cat([first, patches], dim=1) + positions
        query, explained = class_token_query(tokens, grid)
        return Pass(tokens, self._layers, self._head, query, explained, grid)

    def _head(self, rows: Tensor) -> Tensor:
        normed = self._model.vision_model.post_layernorm(rows)
        projected: Tensor = self._model.vision_proj(normed)
        return projected


def _layer(layer: Foreign) -> Layer:
    """A pre-norm layer."""
    attention = layer.self_attn

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        qkv = attention.qkv
        return project_fused(layer.layer_norm1(tokens), pick, qkv.weight, qkv.bias)

    def finish(x: Tensor, o: Tensor) -> Tensor:
        x = x + attention.projection(o)
        rows: Tensor = x + layer.mlp(layer.layer_norm2(x))
        return rows

    def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
        rows: Tensor = layer(tokens)
        return rows

    project = attention.projection
    return Layer(attend, finish, project, project, int(attention.num_heads), run)
