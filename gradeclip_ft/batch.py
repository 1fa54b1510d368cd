"""What a loader hands to an objective or an evaluator: frozen bundles of tensors.

Phrases and regions are flat, with an index `owner` that names the image row: no padding, no lists
of tensors. Every bundle offers `.to()` and `.pin_memory()`, so Lightning and torch's loader move
it like a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

BatchType = TypeVar("BatchType", bound="_Tensors")


@dataclass(frozen=True)
class _Tensors:
    """Moves every tensor field; everything else stays."""

    def to(self: BatchType, device: torch.device | str) -> BatchType:
        # A transfer that waits makes the host wait for all that the GPU still has to do, in every
        # step. Only pinned memory may be left to one that does not: CUDA may still read pageable
        # memory when the call returns, and by then the loader has put the next batch there.
        return self._map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self: BatchType) -> BatchType:
        return self._map(Tensor.pin_memory)

    def _map(self: BatchType, function: Callable[[Tensor], Tensor]) -> BatchType:
        moved: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                moved[entry.name] = function(value)
            elif isinstance(value, _Tensors):
                moved[entry.name] = value._map(function)
        return replace(self, **moved)


@dataclass(frozen=True)
class PackedTexts(_Tensors):
    """Several texts in each row, their common beginnings once; see `models/packing.py`.

    Attributes:
        ids: Tokens.
        position: Of every token in its own text.
        hidden: Which tokens (last axis) a token does not see: all but its own text up to itself.
        end: Place of every text's last token in the flattened rows.
    """

    ids: Int[Tensor, "R T"]
    position: Int[Tensor, "R T"]
    hidden: Bool[Tensor, "R T T"]
    end: Int[Tensor, " M"]


@dataclass(frozen=True)
class CaptionBatch(_Tensors):
    """Images with captions and the phrases found in them.

    Attributes:
        images: Pixels: normalised floats, or uint8 colours, which the training step normalises.
        captions: Token ids of one caption per image.
        distinct: Token ids of each different phrase of the batch, once, in its prompt.
        identity: Hash of each distinct phrase string, the same on every process.
        phrase: Row of `distinct` for every phrase.
        owner: Row of `images` for every phrase.
        most: Phrases of one image at most; None where unknown.
        packed: `captions`, then `distinct`, packed; None where the text tower needs them apart.
        keys: Sample keys, for messages.
        skipped: Samples dropped since the previous batch of the same worker, by cause.
    """

    images: Shaped[Tensor, "B 3 H W"]
    captions: Int[Tensor, "B L"]
    distinct: Int[Tensor, "U K"]
    identity: Int[Tensor, " U"]
    phrase: Int[Tensor, " P"]
    owner: Int[Tensor, " P"]
    most: int | None = None
    packed: PackedTexts | None = None
    keys: tuple[str, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DetectionBatch(_Tensors):
    """Square images with labelled boxes, for training and for testing a detector.

    Attributes:
        images: Normalised pixels; 0 right of and below the content.
        sizes: (height, width) of the content in pixels.
        scale: Pixels of the square per pixel of the original image.
        boxes: xyxy in pixels of the square.
        labels: Class index of each box.
        owner: Row of `images` for every box.
        keys: Names of the images, for messages.
        skipped: Samples dropped since the previous batch of the same worker, by cause.
    """

    images: Float[Tensor, "B 3 S S"]
    sizes: Int[Tensor, "B 2"]
    scale: Float[Tensor, " B"]
    boxes: Float[Tensor, "R 4"]
    labels: Int[Tensor, " R"]
    owner: Int[Tensor, " R"]
    keys: tuple[str, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)


TrainBatch: TypeAlias = CaptionBatch | DetectionBatch
"""What a training step takes."""


@dataclass(frozen=True)
class RegionBatch(_Tensors):
    """Letterboxed images with labelled regions.

    Attributes:
        images: Normalised pixels, padded to a square.
        boxes: xyxy in [0, 1] of the padded square.
        masks: Regions on the patch grid, 0 or 1; None where only boxes are known.
        labels: Class index of each region.
        is_thing: Whether the class is countable (COCO panoptic `isthing`).
        owner: Row of `images` for every region.
        crops: Normalised pixels of each region alone; None unless asked for.
        ignored: Pixels that do not count; None where all of them do.
    """

    images: Float[Tensor, "B 3 H W"]
    boxes: Float[Tensor, "R 4"]
    masks: Shaped[Tensor, "R h w"] | None
    labels: Int[Tensor, " R"]
    is_thing: Shaped[Tensor, " R"]
    owner: Int[Tensor, " R"]
    crops: Float[Tensor, "R 3 S S"] | None = None
    ignored: Bool[Tensor, "B H W"] | None = None


@dataclass(frozen=True)
class PairBatch(_Tensors):
    """Normalised images with the token ids of all their captions; `owner` is a caption's image."""

    images: Float[Tensor, "B 3 H W"]
    texts: Int[Tensor, "M L"]
    owner: Int[Tensor, " M"]


@dataclass(frozen=True)
class ImageBatch(_Tensors):
    """Normalised images with the class index of each."""

    images: Float[Tensor, "B 3 H W"]
    labels: Int[Tensor, " B"]
