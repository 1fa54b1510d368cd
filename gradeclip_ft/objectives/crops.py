"""Self-distillation of dense features from crops (CLIPSelf)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import roi_align

from gradeclip_ft.objectives.step import Step
from gradeclip_ft.ops.heatmap import pool_boxes
from gradeclip_ft.ops.similarity import cosine


@dataclass(frozen=True)
class Crops:
    """Mean of 1 - cos between a cell of F_d and the teacher's embedding of that crop.

    Every step draws one of the grids, and cells of every image; CLIPSelf draws m from 1 to 6 and
    takes all cells.

    Attributes:
        weight: Factor in the total.
        grids: An entry m stands for m x m cells.
        per_image: Cells of an image at most; None for all.
        size: Side of a crop for the teacher, in pixels; None for that of the images.
        teacher: The start model, or the moving average.
    """

    weight: float = 1.0
    grids: Sequence[int] = (2, 3)
    per_image: int | None = None
    size: int | None = None
    teacher: Literal["start", "ema"] = "start"

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """The distance."""
        images = step.batch.images
        boxes, owner = draw_cells(len(images), self.grids, self.per_image)
        boxes, owner = boxes.to(images.device), owner.to(images.device)
        crops = cut(images, boxes, owner, self.size or images.shape[-1])
        wanted = step.teacher(self.teacher).encode(crops)
        return (1 - cosine(pool_boxes(step.dense, boxes, owner), wanted)).mean()


def draw_cells(
    images: int, grids: Sequence[int], most: int | None
) -> tuple[Float[Tensor, "R 4"], Int[Tensor, " R"]]:
    """Cells of one of the grids for every image: boxes, xyxy in [0, 1], and whose they are."""
    side = grids[int(torch.randint(len(grids), ()))]
    count = side * side if most is None else min(most, side * side)
    cell = torch.rand(images, side * side).argsort(1)[:, :count].flatten()
    corner = torch.stack([cell % side, cell // side], dim=1)  # column, row
    boxes = torch.cat([corner, corner + 1], dim=1) / side
    return boxes, torch.arange(images).repeat_interleave(count)


def cut(
    images: Float[Tensor, "B 3 H W"],
    boxes: Float[Tensor, "R 4"],
    owner: Int[Tensor, " R"],
    size: int,
) -> Float[Tensor, "R 3 S S"]:
    """Boxes of images, resized to squares; bilinear, with a mean where they shrink."""
    height, width = images.shape[2:]
    corners = boxes * boxes.new_tensor([width, height, width, height])
    rois = torch.cat([owner.to(corners.dtype).unsqueeze(1), corners], dim=1)
    crops: Tensor = roi_align(images.float(), rois, size, aligned=True)
    return crops
