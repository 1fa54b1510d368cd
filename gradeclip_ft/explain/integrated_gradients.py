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
        share = (torch.arange(self.steps, device=x.device, dtype=x.dtype) + 0.5) / self.steps
        pixels = x.new_zeros(len(owner), height, width)
        for row, image in enumerate(x[owner]):
            for some in torch.split(share, self.batch_size):
                points = (some.view(-1, 1, 1, 1) * image).detach().requires_grad_()
                score = tower.score(tower.encode(points), target[row].expand(len(points), -1))
                (gradient,) = torch.autograd.grad(score.sum(), points)
                pixels[row] += (image * gradient.sum(0)).sum(0) / self.steps
        return adaptive_avg_pool2d(pixels if self.signed else pixels.abs(), grid)
