"""Proposals, region pooling and the box head of F-ViT, on torchvision's parts.

What torchvision lacks is here: anchors at fractional strides that are not rounded, L1 losses, the
least overlap of a forced match, RoIAlign with aligned corners, and a class-agnostic box head that
classifies against text embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import Conv2dNormActivation, box_iou, roi_align
from torchvision.ops.poolers import LevelMapper

from gradeclip_ft.detection.pyramid import Norm, norm_layer
from gradeclip_ft.ops.similarity import unit

RATIOS = (0.5, 1.0, 2.0)
"""Height to width of the anchors."""

ANCHOR_SCALE = 8.0
"""Root of an anchor's area, in strides of its level."""

LEAST_MATCH = 0.3
"""An object without a good anchor takes its best one, if they overlap by this much."""

CELLS = 7
"""Side of a pooled region."""


def level_anchors(grid: tuple[int, int], stride: float) -> Float[Tensor, "A 4"]:
    """Anchors xyxy of one level: by row, by column, then by ratio."""
    ratio = torch.tensor(RATIOS).sqrt()
    side = ANCHOR_SCALE * stride
    half = torch.stack([side / ratio, side * ratio], dim=1) / 2  # width, height
    rows, columns = (torch.arange(cells) * stride for cells in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    centre = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)
    return torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4)


class Anchors(nn.Module):
    """Anchors of all levels, as torchvision's proposal network asks for them."""

    def __init__(self, strides: Sequence[float]) -> None:
        super().__init__()
        self.strides = tuple(strides)

    def forward(self, images: Images, levels: Sequence[Tensor]) -> list[Tensor]:
        """The same for every image."""
        found = [
            level_anchors((level.shape[2], level.shape[3]), stride)
            for level, stride in zip(levels, self.strides, strict=True)
        ]
        anchors = torch.cat(found).to(levels[0].device)
        return [anchors for _ in images.image_sizes]


class Images:
    """What torchvision's proposal network reads of images: the sizes of their contents."""

    def __init__(self, images: Float[Tensor, "B 3 S S"], sizes: Int[Tensor, "B 2"]) -> None:
        self.tensors = images
        self.image_sizes: list[tuple[int, int]] = [(h, w) for h, w in sizes.tolist()]


class PreciseHead(RPNHead):  # type: ignore[misc]
    """torchvision's head with results in fp32: in bf16 a box at 600 pixels moves in steps of 4."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and box deltas of all levels."""
        logits, deltas = super().forward(x)
        return [each.float() for each in logits], [each.float() for each in deltas]


class Proposals(RegionProposalNetwork):  # type: ignore[misc]
    """Class-agnostic proposals; the losses are means over images of means over samples.

    Args:
        channels: Of the levels.
        strides: Of the levels in pixels.
        candidates: Best boxes of each level before non-maximum suppression.
        kept: Best boxes of an image afterwards.
        samples: Anchors of an image that are learned from, at most half of them positive.
    """

    def __init__(
        self, channels: int, strides: Sequence[float], *, candidates: int, kept: int, samples: int
    ) -> None:
        super().__init__(
            Anchors(strides),
            PreciseHead(channels, len(RATIOS), conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=samples,
            positive_fraction=0.5,
            pre_nms_top_n={"training": candidates, "testing": candidates},
            post_nms_top_n={"training": kept, "testing": kept},
            nms_thresh=0.7,
        )

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels (1, 0, or -1 for neither) and the box of each anchor."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for each, target, places in zip(labels, targets, anchors, strict=True):
            if len(target["boxes"]):
                weak = box_iou(target["boxes"], places).amax(0) < LEAST_MATCH
                each[(each == 1) & weak] = 0.0
        return labels, boxes

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of objectness and L1 of the boxes, both in fp32."""
        positive, negative = (torch.stack(part).bool() for part in self.fg_bg_sampler(labels))
        truth, places = (
            torch.stack(labels),
            torch.stack(list(regression_targets)),
        )  # (B, A), (B, A, 4)
        sampled = (positive | negative).float()
        count = sampled.sum(1).clamp(min=1)
        scores = objectness.view_as(truth)
        # An anchor that is neither counts nothing: its label of -1 is multiplied by 0.
        entropy = binary_cross_entropy_with_logits(scores, truth.clamp(min=0), reduction="none")
        distance = (pred_bbox_deltas.view_as(places) - places).abs().sum(2)
        classes = (entropy * sampled).sum(1) / count
        boxes = distance.where(positive, 0.0).sum(1) / count
        return classes.mean(), boxes.mean()


def pool_regions(
    levels: Sequence[Float[Tensor, "B C _ _"]],
    strides: Sequence[float],
    boxes: Sequence[Float[Tensor, "_ 4"]],
    *,
    region: float,
) -> Float[Tensor, "R C 7 7"]:
    """Features of boxes, each from the level that fits its size, by RoIAlign with aligned corners.

    torchvision's MultiScaleRoIAlign has neither aligned corners nor strides such as 3.5.

    Args:
        levels: The first four of the pyramid.
        strides: Of the levels in pixels.
        boxes: xyxy in pixels, one tensor per image.
        region: Side in pixels of boxes that belong to the third level.
    """
    level = LevelMapper(2, 5, region, 4)(list(boxes))
    rois = with_owner(boxes)
    pooled = rois.new_zeros(len(rois), levels[0].shape[1], CELLS, CELLS)
    for number, (features, stride) in enumerate(zip(levels, strides, strict=True)):
        rows = (level == number).nonzero()[:, 0]
        found = roi_align(features.float(), rois[rows], CELLS, 1 / stride, 0, aligned=True)
        pooled = pooled.index_copy(0, rows, found)
    return pooled


def with_owner(boxes: Sequence[Float[Tensor, "_ 4"]]) -> Float[Tensor, "R 5"]:
    """Boxes of all images, each after the row of its image."""
    owner = [each.new_full((len(each), 1), row) for row, each in enumerate(boxes)]
    return torch.cat([torch.cat(owner), torch.cat(list(boxes))], dim=1)


class BoxHead(nn.Module):
    """Pooled regions to logits against class embeddings, and one box for all classes.

    Four convolutions and two layers are shared; a layer each follows. The temperature is learned.

    Args:
        channels: Of the pooled regions.
        dim: Of the class embeddings, and of every layer.
        norm: Of the convolutions.
    """

    def __init__(self, channels: int, dim: int, norm: Norm) -> None:
        super().__init__()
        layer = norm_layer(norm)
        self.shared = nn.Sequential(
            *(Conv2dNormActivation(channels, channels, 3, norm_layer=layer) for _ in range(4)),
            nn.Flatten(),
            nn.Linear(channels * CELLS * CELLS, dim),
            nn.ReLU(),
            nn.Linear(dim, dim),
            nn.ReLU(),
        )
        self.embed = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        last = nn.Linear(dim, 4)
        nn.init.normal_(last.weight, std=1e-3)
        nn.init.zeros_(last.bias)
        self.place = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), last)
        self.temperature = nn.Parameter(torch.tensor(50.0))

    def forward(
        self, regions: Float[Tensor, "R C 7 7"], classes: Float[Tensor, "K D"]
    ) -> tuple[Float[Tensor, "R K"], Float[Tensor, "R 4"]]:
        """Logits (cosine times temperature) and box deltas, both in fp32."""
        features = self.shared(regions)
        embedded, deltas = self.embed(features), self.place(features)
        with torch.autocast(features.device.type, enabled=False):
            return unit(embedded) @ classes.T * self.temperature, deltas.float()
