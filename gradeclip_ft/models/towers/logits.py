"""An image tower whose embedding is the logits of a classifier."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.passes import Pass
from gradeclip_ft.models.tower import ImageTower
from gradeclip_ft.models.towers.base import PassTower
from gradeclip_ft.ops.similarity import product


class LogitTower(PassTower):
    """Another tower, explained by embedding · target: by the unit vector of a class, its logit."""

    score = staticmethod(product)

    def __init__(self, tower: ImageTower) -> None:
        self._tower = tower
        self.width, self.heads, self.depth = tower.width, tower.heads, tower.depth
        self.patch, self.pooling = tower.patch, tower.pooling

    def open(self, x: Float[Tensor, "B 3 H W"]) -> Pass:
        """The other tower's forward pass."""
        return replace(self._tower.open(x), score=product)
