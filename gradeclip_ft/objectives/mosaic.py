"""Self-distillation of dense features without crops: canvases of whole images (CLIM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate

from gradeclip_ft.losses import AlignmentOptions, alignment_loss
from gradeclip_ft.objectives.step import Step
from gradeclip_ft.ops.distributed import rank
from gradeclip_ft.ops.heatmap import pool_boxes
from gradeclip_ft.ops.similarity import cosine

CONTRAST = AlignmentOptions(kind="contrastive", negatives="all")


@dataclass(frozen=True)
class Mosaic:
    """Images of the batch side by side: F_d of a cell is to say what the image alone says.

    Every step draws one of the grids and puts every image on one canvas of the size of the images.

    Attributes:
        weight: Factor in the total.
        grids: An entry m stands for m x m images on a canvas.
        target: `image`, 1 - cos to the embedding of the image itself, as the model has it now and
            without gradient; `start` or `ema`, as a teacher has it; or `caption`, CLIM's
            contrast of cells and images with captions.
    """

    weight: float = 1.0
    grids: Sequence[int] = (2, 3)
    target: Literal["image", "start", "ema", "caption"] = "image"

    @property
    def teacher(self) -> Literal["start", "ema"] | None:
        """The copy of the model that it asks, if any."""
        return self.target if self.target in ("start", "ema") else None

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """The distance, or the contrast."""
        images = step.batch.images
        side = self.grids[int(torch.randint(len(self.grids), ()))]
        order = torch.randperm(len(images))
        canvases, boxes, owner = tile(images, order.to(images.device), side)
        dense = step.clip.image.trace(canvases).dense()
        cells = pool_boxes(dense, boxes, owner)[: len(order)]  # the last canvas repeats some
        if self.target == "caption":
            return _contrast(step, cells, order.to(images.device))
        view = None if self.teacher is None else step.teacher(self.teacher)
        wanted = step.embedding.detach() if view is None else view.embedding
        return (1 - cosine(cells, wanted[order.to(wanted.device)])).mean()


def tile(
    images: Float[Tensor, "B 3 H W"], order: Int[Tensor, " B"], side: int
) -> tuple[Float[Tensor, "K 3 H W"], Float[Tensor, "R 4"], Int[Tensor, " R"]]:
    """Canvases of side x side images in this order, from the top left, row by row.

    Args:
        images: Pixels.
        order: Rows of images. Where they do not fill the last canvas, they begin again.
        side: Images beside each other.

    Returns:
        Canvases of the size of an image; the place of every image on them, xyxy in [0, 1], and its
        canvas, both in `order`.
    """
    height, width = images.shape[2:]
    count = -(-len(order) // side**2)  # rounded up
    picked = order.repeat(-(-count * side**2 // len(order)))[: count * side**2].view(count, side**2)
    ys = [round(row * height / side) for row in range(side + 1)]
    xs = [round(column * width / side) for column in range(side + 1)]
    canvases = images.new_empty(count, *images.shape[1:])
    boxes = []
    for place in range(side**2):
        row, column = divmod(place, side)
        top, bottom, left, right = ys[row], ys[row + 1], xs[column], xs[column + 1]
        canvases[:, :, top:bottom, left:right] = interpolate(
            images[picked[:, place]],
            size=(bottom - top, right - left),
            mode="bilinear",
            antialias=True,
        )
        boxes.append([left / width, top / height, right / width, bottom / height])
    places = images.new_tensor(boxes, dtype=torch.float).repeat(count, 1)
    return canvases, places, torch.arange(count, device=images.device).repeat_interleave(side**2)


def _contrast(
    step: Step, cells: Float[Tensor, "B D"], order: Int[Tensor, " B"]
) -> Float[Tensor, ""]:
    """InfoNCE of cells and whole images against captions, an image's own ones no negatives."""
    images = torch.arange(len(order), device=order.device)
    identity = torch.cat([order, images]) + (rank() << 32)
    regions = torch.cat([cells, step.embedding.float()])
    captions = torch.cat([step.captions[order], step.captions])
    with step.single_precision():
        terms = alignment_loss(
            regions,
            captions,
            identity=identity,
            weight=torch.ones_like(identity, dtype=torch.float),
            scale=step.clip.log_scale.exp(),
            options=CONTRAST,
        )
    return terms.loss
