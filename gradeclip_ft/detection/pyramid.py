"""A frozen image tower to a pyramid of feature maps, as F-ViT builds it (CLIPSelf, section 4).

A ViT has one grid. Three inner layers and the value path of the last one give four maps of it;
small convolutions bring them to a quarter, a half, one and two patches per cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from gradeclip_ft.models.tower import Tower
from gradeclip_ft.models.trace import UnsupportedTowerError

Norm: TypeAlias = Literal["batch", "group"]
STRIDES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the five levels, in patches."""


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """Channels to a normalisation layer.

    Args:
        norm: "batch" is F-ViT's, synchronised by Lightning (`sync_batchnorm`) and made for batches
            of 64; "group" normalises groups of eight channels of each image and needs no batch.
    """
    return (
        nn.BatchNorm2d
        if norm == "batch"
        else lambda channels: nn.GroupNorm(channels // 8, channels)
    )


def inner_maps(
    tower: Tower, images: Float[Tensor, "B 3 H W"], inner: Sequence[int]
) -> tuple[list[Float[Tensor, "B C h w"]], Float[Tensor, "B h w D"]]:
    """Patch tokens after some blocks, those of the last layer's value path, and dense features.

    Args:
        tower: Of images.
        images: Normalised pixels; sides are multiples of the patch.
        inner: Blocks before the last layer, in rising order, counted from 0.

    Raises:
        UnsupportedTowerError: The tower cannot be taken apart, or lacks such blocks.
    """
    opened = tower.open(images)
    last = len(opened.layers) - 1
    if not last:
        raise UnsupportedTowerError(
            "the image tower has no tokens of inner layers (it is a ResNet, or has one layer), so "
            "no pyramid can be built on it; choose a ViT, EVA02-B-16 for example"
        )
    if not inner or sorted(inner) != list(inner) or not 0 <= inner[0] <= inner[-1] < last:
        raise UnsupportedTowerError(
            f"inner={list(inner)}: give blocks from 0 to {last - 1} in rising order; the last "
            "layer's value path is added"
        )
    assert opened.grid is not None
    height, width = opened.grid

    def to_map(rows: Tensor) -> Tensor:
        return rows.transpose(1, 2).reshape(len(rows), -1, height, width)

    tokens, start, maps = opened.tokens, 0, []
    for block in inner:
        tokens, start = opened.run(tokens, start, block + 1), block + 1
        maps.append(to_map(tokens[:, -height * width :]))
    trace = opened.trace_from(tokens, start)
    # The value path before norm and projection: F-ViT's last map is as wide as the others.
    patches, values = trace.tokens[:, -height * width :], trace.v[:, -height * width :]
    rows = opened.layers[last].finish(patches, values)
    dense = opened.head(rows)
    return [*maps, to_map(rows)], dense.view(len(dense), height, width, -1)


class Pyramid(nn.Module):
    """Four maps of one grid to five levels of strides 1/4, 1/2, 1, 2 and 4 patches.

    Args:
        widths: Channels of the maps; that of a pool's value path may be another than the blocks'.
        channels: Of every level.
        norm: Of the convolutions.
    """

    def __init__(self, widths: Sequence[int], channels: int, norm: Norm) -> None:
        super().__init__()
        layer = norm_layer(norm)

        def twice(width: int) -> nn.Module:
            return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

        first, second, _, _ = widths
        self.scale = nn.ModuleList(
            [
                nn.Sequential(twice(first), layer(first), nn.GELU(), twice(first)),
                twice(second),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.fpn = FeaturePyramidNetwork(
            list(widths), channels, extra_blocks=LastLevelMaxPool(), norm_layer=layer
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels, the finest one first."""
        scaled = {str(row): self.scale[row](each) for row, each in enumerate(maps)}
        return list(self.fpn(scaled).values())
