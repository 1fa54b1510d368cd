"""RISE (Petsiuk et al., 2018): random masks on the picture, the model as a black box."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from gradeclip_ft.models.tower import Tower, patch_grid


@dataclass(frozen=True)
class Rise:
    """H = Σ_n S(I ⊙ m_n) m_n / (N p), m_n random grids enlarged with a random shift.

    All phrases of a picture share its masks, and all pictures of a call share one set.

    Attributes:
        masks: N.
        cells: Side of the random grid.
        keep: p, the chance of a cell to stay.
        batch_size: Masked pictures per forward pass; does not change the map.
        seed: Of the masks.
    """

    masks: int = 2000
    cells: int = 8
    keep: float = 0.5
    batch_size: int = 64
    seed: int = 0

    images_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.masks, self.cells, self.batch_size) < 1 or not 0 < self.keep <= 1:
            raise ValueError(
                f"masks is {self.masks}, cells {self.cells} and batch_size {self.batch_size}, "
                f"keep is {self.keep}; use 1 or more, and for keep a share above 0, up to 1"
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
        total = x.new_zeros(len(target), height, width)
        for start in range(0, self.masks, self.batch_size):
            numbers = range(start, min(self.masks, start + self.batch_size))
            masks = torch.stack([self.mask(number, height, width) for number in numbers]).to(x)
            for image in torch.unique(owner):
                mine = target[owner == image]
                with torch.no_grad():
                    found = tower.encode(x[image] * masks.unsqueeze(1))  # (n, D)
                score = tower.score(
                    found.repeat(len(mine), 1), mine.repeat_interleave(len(found), 0)
                )
                score = score.view(len(mine), len(found))
                total[owner == image] += torch.einsum("pn,nhw->phw", score, masks)
        return adaptive_avg_pool2d(total / (self.masks * self.keep), grid)

    def mask(self, number: int, height: int, width: int) -> Float[Tensor, "H W"]:
        """One mask; each has its own seed, so that batches do not matter."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        cells = (torch.rand(self.cells, self.cells, generator=generator) < self.keep).float()
        cell = (-(-height // self.cells), -(-width // self.cells))  # pixels, rounded up
        size = [(self.cells + 1) * side for side in cell]
        large = interpolate(cells[None, None], size=size, mode="bilinear", align_corners=False)
        top, left = (int(torch.randint(side, (), generator=generator)) for side in cell)
        return large[0, 0, top : top + height, left : left + width]
