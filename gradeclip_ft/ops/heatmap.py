"""Small functions on heat maps: 0-1 normalisation, tokens to grid, grid to pixels and points."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate
from torchvision.ops import roi_align

from gradeclip_ft.ops.similarity import unit

EPS = 1e-8  # a row whose range is smaller is constant


def min_max(x: Float[Tensor, "R N"], among: Bool[Tensor, "R N"]) -> Float[Tensor, "R N"]:
    """0-1 normalisation of every row (Φ in Grad-ECLIP, eq. 20); a constant row becomes 1.

    Minimum and maximum are those `among` these positions; all others become 0.
    """
    # The class token is left out: its key is closest to the query and would set the maximum.
    low = x.masked_fill(~among, torch.inf).amin(-1, keepdim=True)
    high = x.masked_fill(~among, -torch.inf).amax(-1, keepdim=True)
    flat = high - low < EPS  # 0/0 would be NaN; without a difference no token is preferred
    scaled = (x - low) / (high - low).masked_fill(flat, 1.0)
    return torch.where(flat, 1.0, scaled).masked_fill(~among, 0.0)


def sparse(heat: Float[Tensor, "P h w"]) -> Float[Tensor, "P h w"]:
    """SPARC's weights: 0-1 normalised, 0 below one over the number of patches, of sum 1.

    A map of zeros stays one; a constant one becomes uniform.
    """
    cells = heat.flatten(1)  # (P, n)
    scaled = min_max(cells, torch.ones_like(cells, dtype=torch.bool))
    kept = scaled.masked_fill((scaled < 1 / cells.shape[1]) | (cells.amax(1, True) <= 0), 0.0)
    return (kept / kept.sum(1, keepdim=True).clamp(min=1e-12)).view_as(heat)


def above(heat: Float[Tensor, "P h w"], share: float) -> Float[Tensor, "P h w"]:
    """The map where it reaches this share of its own maximum, 0 elsewhere."""
    return heat.masked_fill(heat < share * heat.amax((1, 2), keepdim=True), 0.0)


def to_grid(
    relevance: Float[Tensor, "P N"], grid: tuple[int, int] | None
) -> Float[Tensor, "P h w"]:
    """Relevance of the patch tokens, which are the last h·w of all tokens, as a map."""
    if grid is None:
        raise ValueError("heat maps exist for images; this is the pass of a text")
    height, width = grid
    return relevance[:, relevance.shape[1] - height * width :].reshape(-1, height, width)


def to_pixels(heat: Float[Tensor, "P h w"], size: tuple[int, int]) -> Float[Tensor, "P H W"]:
    """Maps at the size (height, width) of the picture, bilinear; patch centres stay in place."""
    enlarged: Tensor = interpolate(
        heat.unsqueeze(1), size=list(size), mode="bilinear", align_corners=False
    )
    return enlarged.squeeze(1)


def at_points(
    heat: Float[Tensor, "P h w"], y: Float[Tensor, " H"], x: Float[Tensor, " W"]
) -> Float[Tensor, "P H W"]:
    """Maps at the crossings of rows and columns, bilinear; NaN outside of the map.

    Args:
        heat: Any grid.
        y: Rows, from 0 at the upper edge of the map to 1 at the lower one.
        x: Columns, from 0 at the left edge to 1 at the right one.
    """
    columns, rows = torch.meshgrid(2 * x - 1, 2 * y - 1, indexing="xy")  # (H, W)
    points = torch.stack([columns, rows], 2).to(heat).unsqueeze(0)
    # Within half a cell of the edge the value is that of the edge, as `to_pixels` has it.
    found = grid_sample(heat.unsqueeze(0), points, padding_mode="border", align_corners=False)[0]
    outside = ((y < 0) | (y > 1)).unsqueeze(1) | ((x < 0) | (x > 1))
    return found.masked_fill(outside.to(heat.device), torch.nan)


def owned_products(
    rows: Float[Tensor, "B N C"],
    vectors: Float[Tensor, "P C"],
    owner: Int[Tensor, " P"],
    *,
    most: int | None = None,
) -> Float[Tensor, "P N"]:
    """Every row of an image times the vectors of its phrases, whose image is `owner`.

    Args:
        rows: Of B images.
        vectors: One per phrase.
        owner: Image row of each phrase.
        most: Phrases of one image at most; None to count them, for which the host waits.
    """
    if len(rows) == 1:
        return vectors @ rows[0].T
    place, most = _places(owner, len(rows), most)
    padded = _padded(vectors, place, len(rows), most)  # (B, M, C)
    return (padded @ rows.transpose(1, 2)).flatten(0, 1)[place]


def pool_heatmap(
    dense: Float[Tensor, "B h w D"],
    heat: Float[Tensor, "P h w"],
    owner: Int[Tensor, " P"],
    *,
    normalize_tokens: bool = True,
    most: int | None = None,
) -> Float[Tensor, "P D"]:
    """Region embedding F_r = Σ_i H_i · F_d,i of each phrase (Grad-ECLIP, 5), not normalised.

    A map of zeros gives a row of zeros.

    Args:
        dense: Value-path features F_d.
        heat: Heat maps, non-negative; their scale cancels in a cosine.
        owner: Image row of each phrase.
        normalize_tokens: Bring every token of F_d to length 1 first, as CLIPSelf does.
        most: As in `owned_products`.
    """
    tokens = (unit(dense) if normalize_tokens else dense.float()).flatten(1, 2)  # (B, n, D)
    return _weighted_sums(tokens, heat.flatten(1).to(tokens.dtype), owner, most)


def _weighted_sums(
    tokens: Float[Tensor, "B n D"],
    weights: Float[Tensor, "P n"],
    owner: Int[Tensor, " P"],
    most: int | None = None,
) -> Float[Tensor, "P D"]:
    """Sum of the tokens of an image by the weights of each of its phrases."""
    if len(tokens) == 1:
        return weights @ tokens[0]
    place, most = _places(owner, len(tokens), most)
    return (_padded(weights, place, len(tokens), most) @ tokens).flatten(0, 1)[place]


def _places(owner: Int[Tensor, " P"], images: int, most: int | None) -> tuple[Tensor, int]:
    """Place of every phrase in a flattened table of B images and M phrases each, and M.

    With the phrases of an image side by side, one product per image serves all of them. The other
    way, a copy of the image for each of its phrases, takes P instead of B times its memory.
    """
    order = owner.argsort(stable=True)
    counts = torch.zeros(images, dtype=owner.dtype, device=owner.device)
    counts = counts.scatter_add(0, owner, torch.ones_like(owner))
    if most is None:
        most = int(counts.max())
    before = counts.cumsum(0) - counts  # phrases of the images above
    number = torch.arange(len(owner), device=owner.device) - before[owner[order]]
    return owner * most + torch.empty_like(owner).scatter_(0, order, number), most


def _padded(
    values: Float[Tensor, "P K"], place: Int[Tensor, " P"], images: int, most: int
) -> Float[Tensor, "B M K"]:
    """One row of values per phrase as a table, 0 where an image has fewer phrases."""
    table = values.new_zeros((images * most, values.shape[1]))
    return table.index_copy(0, place, values).view(images, most, values.shape[1])


def pool_boxes(
    dense: Float[Tensor, "B h w D"],
    boxes: Float[Tensor, "R 4"],
    owner: Int[Tensor, " R"],
) -> Float[Tensor, "R D"]:
    """Unit region features by RoIAlign, one cell per box (CLIPSelf's protocol).

    Args:
        dense: Value-path features.
        boxes: xyxy in [0, 1] of the (padded) image.
        owner: Image row of each box.
    """
    features = unit(dense).permute(0, 3, 1, 2)  # (B, D, h, w)
    height, width = features.shape[2:]
    scale = boxes.new_tensor([width, height, width, height])
    rois = torch.cat([owner.to(boxes.dtype).unsqueeze(1), boxes * scale], dim=1).float()
    # As many points per side as the box spans cells; values lie at the centres of cells.
    pooled = roi_align(features, rois, (1, 1), 1.0, sampling_ratio=-1, aligned=True)
    return unit(pooled.flatten(1))


def pool_masks(
    dense: Float[Tensor, "B h w D"],
    masks: Shaped[Tensor, "R h w"],
    owner: Int[Tensor, " R"],
) -> Float[Tensor, "R D"]:
    """Unit region features by the mean over masked tokens; an empty mask gives a row of zeros.

    Args:
        dense: Value-path features.
        masks: 1 (or true) where the region is, on the patch grid.
        owner: Image row of each mask.
    """
    tokens = unit(dense).flatten(1, 2)  # (B, n, D)
    weights = masks.flatten(1).to(tokens.dtype)  # (R, n)
    weights = weights / (weights.sum(1, keepdim=True) + 1e-12)
    return unit(_weighted_sums(tokens, weights, owner))
