"""Models at another image size than they were made for.

Towers interpolate their positions to the images they get. open_clip's own ViT is changed for good,
because open_clip builds it at any size, so that an export at this size is exact; trunks of timm and
ResNets keep their table, because open_clip can load no other.
"""

from __future__ import annotations

from collections.abc import Sequence

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from gradeclip_ft.models.tower import Foreign
from gradeclip_ft.ops.positions import resample_positions


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a side or of two.

    Raises:
        ValueError: Neither one nor two positive numbers.
    """
    sides = (size, size) if isinstance(size, int) else tuple(int(side) for side in size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"image size is {size}, expected a side or (height, width) in pixels")
    return sides[0], sides[1]


def checked_size(
    wanted: int | Sequence[int] | None, own: int | Sequence[int], patch: int, name: str
) -> tuple[int, int]:
    """(height, width) of the images that a model gets.

    Args:
        wanted: By the user; None for the model's own.
        own: What the model was made for.
        patch: Side of a patch; 0 where unknown.
        name: Of the model.

    Raises:
        ValueError: A side is no multiple of the patch.
    """
    height, width = size = pair(own if wanted is None else wanted)
    if patch and (height % patch or width % patch):
        wrong = height if height % patch else width
        below = wrong // patch * patch
        raise ValueError(
            f"image size {wrong} is not a multiple of the patch size {patch} of {name}; use "
            f"{below or patch} or {below + patch}"
        )
    return size


def set_image_size(model: Foreign, size: int | Sequence[int] | None) -> None:
    """Resize a native ViT's table of positions; tell trunks without one what to expect.

    Sides that are no multiple of the patch are left to the caller's check.
    """
    visual = model.visual
    if size is None:
        return
    height, width = pair(size)
    if isinstance(visual, VisionTransformer):
        grid = (height // visual.patch_size[0], width // visual.patch_size[1])
        if min(grid) < 1:
            return
        table = visual.positional_embedding
        rows = resample_positions(table.data, tuple(visual.grid_size), grid)
        visual.positional_embedding = nn.Parameter(rows, requires_grad=table.requires_grad)
        visual.grid_size, visual.image_size = grid, (height, width)
    elif isinstance(visual, TimmModel) and not hasattr(visual.trunk, "pos_embed"):
        visual.set_input_size((height, width))
