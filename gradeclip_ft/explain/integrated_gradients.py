"""Integrated gradients (Sundararajan et al., 2017) of the score over the pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from gradeclip_ft.models.tower import Tower, patch_grid


@dataclass(frozen=True)
class IntegratedGradients:
    """H = | Σ over channels of (x - x0) ⊙ mean_k ∂S/∂x at x0 + (k - ½)/K (x - x0) |.

    x0 is the mean picture: zeros of the normalised pixels.

    Attributes:
        steps: K.
        batch_size: Pictures per forward pass; does not change the map.
        signed: Keep the sign, whose sum is S(x) - S(x0).
    """

    steps: int = 50
    batch_size: int = 16
    signed: bool = False

    images_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1:
            raise ValueError(
                f"steps is {self.steps} and batch_size {self.batch_size}; use 1 or more"
            )

    def from_input(
        self,
        tower: Tower,
        x: Float[Tensor, "B 3 H W"],
        target: Float[Tensor, "P D"],
        owner: Int[Tensor, " P"],
    ) -> Float[Tensor, "P h w"]:
        """Relevance at the patch grid: the mean of the pixels' over each patch.

        Raises:
            UnsupportedTowerError: The tower has no grid.
        """
        height, width = x.shape[2:]
        grid = patch_grid(tower, height, width)
        maps = [self._pixels(tower, x[o], target[row]) for row, o in enumerate(owner.tolist())]
        pixels = torch.stack(maps) if maps else x.new_zeros(0, height, width)
        return adaptive_avg_pool2d(pixels, grid)

    def _pixels(self, tower: Tower, x: Tensor, target: Tensor) -> Float[Tensor, "H W"]:
        total = torch.zeros_like(x)
        share = (torch.arange(self.steps, device=x.device, dtype=x.dtype) + 0.5) / self.steps
        for first in range(0, self.steps, self.batch_size):
            some = share[first : first + self.batch_size]
            points = (some.view(-1, 1, 1, 1) * x).detach().requires_grad_()
            score = tower.score(tower.encode(points), target.expand(len(points), -1)).sum()
            (gradient,) = torch.autograd.grad(score, points)
            total += gradient.sum(0)
        signed = (x * total / self.steps).sum(0)
        return signed if self.signed else signed.abs()
