"""Image, boxes and masks into one square: the longer side fills it, the rest is padded.

CLIPSelf's protocol, which Grad-ECLIP's Table 7 follows: padding right and below, no crop, no
distortion beyond rounding. Others (FineCLIP) stretch both sides to the square.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Shaped
from PIL import Image
from torch import Tensor

Fit = Literal["letterbox", "stretch"]


def letterbox_size(height: int, width: int, side: int, fit: Fit = "letterbox") -> tuple[int, int]:
    """(height, width) of the content in a square of `side`, at least 1 each.

    >>> letterbox_size(480, 640, 224)
    (168, 224)
    """
    if fit == "stretch":
        return side, side
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def letterbox_image(image: Image.Image, side: int, fit: Fit = "letterbox") -> Image.Image:
    """Resize bicubically and pad right and below with black, before any normalisation."""
    height, width = letterbox_size(image.height, image.width, side, fit)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if height == width == side:
        return image
    square = Image.new("RGB", (side, side))
    square.paste(image, (0, 0))
    return square


def letterbox_boxes(
    boxes: Float[Tensor, "R 4"], *, height: int, width: int, fit: Fit = "letterbox"
) -> Float[Tensor, "R 4"]:
    """Boxes as xyxy in [0, 1] of the padded square.

    Args:
        boxes: (x, y, width, height) in pixels of the original image.
        height: Of the original image.
        width: Of the original image.
        fit: How the image came into the square.
    """
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    if fit == "stretch":
        return corners / boxes.new_tensor([width, height, width, height])
    return corners / max(height, width)


def letterbox_masks(
    masks: Shaped[Tensor, "R H W"], cells: int, *, antialias: bool, fit: Fit = "letterbox"
) -> Float[Tensor, "R h w"]:
    """Masks on the patch grid of the padded square: 1 where the bicubic resize is above 0.

    The masks are resized directly to the grid, like the image to its pixels.

    Args:
        masks: 1 inside, at the original size.
        cells: Side of the square grid.
        antialias: Torchvision 0.17 and later antialias by default, earlier releases do not; with it
            no object vanishes, but each swells to 7 cells or more.
        fit: How the image came into the square.
    """
    height, width = letterbox_size(masks.shape[1], masks.shape[2], cells, fit)
    grid = torch.zeros(len(masks), cells, cells)
    if len(masks):
        grid[:, :height, :width] = torch.nn.functional.interpolate(
            masks.unsqueeze(1).float(), (height, width), mode="bicubic", antialias=antialias
        ).squeeze(1)
    return (grid > 0).float()


def tight_boxes(masks: Shaped[Tensor, "R H W"]) -> Float[Tensor, "R 4"]:
    """Smallest boxes around the masks as (x, y, width, height) in pixels; zeros for empty masks."""
    x, x_size = _extent(masks.bool().any(1))
    y, y_size = _extent(masks.bool().any(2))
    return torch.stack([x, y, x_size, y_size], dim=1).float()


def _extent(present: Shaped[Tensor, "R n"]) -> tuple[Tensor, Tensor]:
    """First position and length of the range that holds every true value."""
    position = torch.arange(present.shape[1])
    first = position.where(present, present.shape[1]).amin(1)
    last = position.where(present, -1).amax(1)
    empty = last < 0
    return first.masked_fill(empty, 0), (last - first + 1).masked_fill(empty, 0)
