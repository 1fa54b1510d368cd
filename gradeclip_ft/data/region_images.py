"""Opened regions: letterboxed images with labelled boxes and masks, one image per item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F  # noqa: N812

from gradeclip_ft.batch import RegionBatch
from gradeclip_ft.data.coco import Category, Picture, Region, region_masks
from gradeclip_ft.data.files import open_image
from gradeclip_ft.data.letterbox import (
    Fit,
    letterbox_boxes,
    letterbox_image,
    letterbox_masks,
    tight_boxes,
)
from gradeclip_ft.data.processes import once


@dataclass(frozen=True)
class RegionSample:
    """One letterboxed image with its regions; fields as in `RegionBatch`."""

    image: Float[Tensor, "3 H W"]
    boxes: Float[Tensor, "R 4"]
    masks: Float[Tensor, "R h w"]
    labels: Int[Tensor, " R"]
    is_thing: Bool[Tensor, " R"]
    crops: Float[Tensor, "R 3 S S"] | None = None


@dataclass(frozen=True)
class RegionImages(Dataset[RegionSample]):
    """One letterboxed image with its regions per item.

    Attributes:
        annotations: The annotation file.
        images: Folder of the images.
        segments: Folder of the panoptic PNGs; None for instance files.
        mask_antialias: Antialias when masks are resized to the patch grid.
        categories: In order of the labels.
        pictures: Images with the regions that count.
        skipped: Left out, by cause.
        image_size: Side of the padded square in pixels.
        patch: Side of a cell in pixels.
        mean: Pixel statistics of the model.
        std: Pixel statistics of the model.
        fit: How images come into the square.
        crop_size: Side in pixels of a crop of each region; None for no crops.
        crop_scale: Crops of things are their boxes enlarged by this factor.
    """

    annotations: Path
    images: Path
    segments: Path | None
    mask_antialias: bool
    categories: Sequence[Category]
    pictures: Sequence[tuple[Picture, Sequence[Region]]]
    skipped: dict[str, int]
    image_size: int
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Fit
    crop_size: int | None
    crop_scale: float

    @property
    def names(self) -> list[str]:
        """Class names in order of the labels."""
        return [category.name for category in self.categories]

    @property
    def files(self) -> list[Path]:
        """Annotation files, which a fingerprint reads."""
        return [self.annotations]

    @property
    def listed(self) -> list[Path]:
        """Images and masks, which a fingerprint lists."""
        images = [self.images / picture.file_name for picture, _ in self.pictures]
        if self.segments is None:
            return images
        names = [picture.segments for picture, _ in self.pictures]
        return images + [self.segments / name for name in names if name is not None]

    @property
    def counts(self) -> dict[str, Any]:
        """Images and regions that count, and those left out."""
        things = [
            self.categories[region.label].is_thing
            for _, regions in self.pictures
            for region in regions
        ]
        return {
            "images": len(self.pictures),
            "things": sum(things),
            "stuff": len(things) - sum(things),
            "skipped": self.skipped,
        }

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> RegionSample:
        """Letterboxed image number `index`.

        Raises:
            ValueError: The image cannot be read or is of another size than annotated.
        """
        picture, regions = self.pictures[index]
        path = self.images / picture.file_name
        image = open_image(path)
        if (image.height, image.width) != (picture.height, picture.width):
            raise ValueError(
                f"{path} (id {picture.id}) has {image.height} x {image.width} pixels (height x "
                f"width), the annotation file says {picture.height} x {picture.width}"
            )
        masks = torch.from_numpy(region_masks(picture, regions, self.segments))
        labels = torch.tensor([region.label for region in regions])
        is_thing = torch.tensor([self.categories[region.label].is_thing for region in regions])
        boxes = torch.tensor([region.box for region in regions])
        boxes[~is_thing] = tight_boxes(masks[~is_thing])
        height, width = picture.height, picture.width
        return RegionSample(
            image=self._pixels(image, self.image_size),
            boxes=letterbox_boxes(boxes, height=height, width=width, fit=self.fit),
            masks=letterbox_masks(
                masks,
                self.image_size // self.patch,
                antialias=self.mask_antialias,
                fit=self.fit,
            ),
            labels=labels,
            is_thing=is_thing,
            crops=None if self.crop_size is None else self._crops(image, boxes, is_thing),
        )

    def _pixels(self, image: Image.Image, side: int) -> Float[Tensor, "3 S S"]:
        square = F.pil_to_tensor(letterbox_image(image, side, self.fit))
        pixels: Tensor = F.normalize(
            F.to_dtype(square, torch.float32, scale=True), list(self.mean), list(self.std)
        )
        return pixels

    def _crops(
        self, image: Image.Image, boxes: Float[Tensor, "R 4"], is_thing: Bool[Tensor, " R"]
    ) -> Float[Tensor, "R 3 S S"]:
        """Each region alone, at least one pixel of it; boxes of things are enlarged."""
        assert self.crop_size is not None
        crops = []
        for (x, y, width, height), thing in zip(boxes.tolist(), is_thing.tolist(), strict=True):
            more = (self.crop_scale - 1) / 2 if thing else 0.0
            left, top = max(0.0, x - more * width), max(0.0, y - more * height)
            right = min(float(image.width), x + width + more * width)
            bottom = min(float(image.height), y + height + more * height)
            edges = [int(left), int(top), math.ceil(right), math.ceil(bottom)]
            crops.append(self._pixels(image.crop(tuple(edges)), self.crop_size))
        return torch.stack(crops)

    def batches(self, batch_size: int, workers: int) -> DataLoader[RegionBatch]:
        """All regions once, in file order; leaves torch's global random state alone."""
        return once(self, join_regions, batch_size=batch_size, workers=workers)


def join_regions(samples: Sequence[RegionSample]) -> RegionBatch:
    """Images of one batch with their regions flat."""
    counts = torch.tensor([len(sample.labels) for sample in samples])
    return RegionBatch(
        images=torch.stack([sample.image for sample in samples]),
        boxes=torch.cat([sample.boxes for sample in samples]),
        masks=torch.cat([sample.masks for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        is_thing=torch.cat([sample.is_thing for sample in samples]),
        owner=torch.arange(len(samples)).repeat_interleave(counts),
        crops=torch.cat(crops) if (crops := _crops_of(samples)) else None,
    )


def _crops_of(samples: Sequence[RegionSample]) -> list[Tensor]:
    return [sample.crops for sample in samples if sample.crops is not None]
