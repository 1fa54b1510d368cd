"""Which labelled regions of COCO files count, by the protocol of Grad-ECLIP's Table 7.

Panoptic files give boxes and masks of things and stuff, instance files those of things.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F  # noqa: N812

from gradeclip_ft.batch import RegionBatch
from gradeclip_ft.data.coco import Category, CocoImage, Region, read_regions, region_masks
from gradeclip_ft.data.files import (
    prepare_files,
    require_images,
    subset,
    subset_protocol,
)
from gradeclip_ft.data.loading import evaluation_loader
from gradeclip_ft.images import read_image

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
    pictures: Sequence[tuple[CocoImage, Sequence[Region]]]
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
        image = read_image(path, exif=False)  # boxes and masks are about the stored pixels
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
        return evaluation_loader(self, join_regions, batch_size=batch_size, workers=workers)


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


LETTERBOX = "bicubic, padded right and below with black"
STRETCHED = "bicubic, both sides stretched"


@dataclass(frozen=True)
class CocoRegions:
    """Where regions are and which of them count.

    Attributes:
        annotations: A panoptic or an instances file.
        images: Folder of the images.
        segments: Folder of the panoptic PNGs; None for an instances file.
        min_area: Regions whose box has fewer pixels (of the original image) are left out.
        max_regions: Only the first so many of an image count.
        crowd: Keep regions that are groups (`iscrowd`).
        mask_antialias: Antialias when masks are resized to the patch grid.
        fit: "letterbox" pads, "stretch" distorts both sides to the square.
        crop_scale: Crops of things are their boxes enlarged by this factor.
        limit: Only so many images, drawn with `limit_seed`; None for all.
        limit_seed: Of that draw.
        make: Called when the annotation file does not exist, to make it.
    """

    annotations: str
    images: str
    segments: str | None = None
    min_area: int = 64
    max_regions: int = 100
    crowd: bool = True
    mask_antialias: bool = True
    fit: Fit = "letterbox"
    crop_scale: float = 1.5
    limit: int | None = None
    limit_seed: int = 0
    make: Callable[[], object] | None = None

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        return {
            "source": "instances" if self.segments is None else "panoptic",
            "boxes": "annotated for things, tight for stuff",
            "min_area": self.min_area,
            "max_regions": self.max_regions,
            "crowd": self.crowd,
            "mask_antialias": self.mask_antialias,
            "letterbox": LETTERBOX if self.fit == "letterbox" else STRETCHED,
            **subset_protocol(self.limit, self.limit_seed),
        }

    def prepare(self) -> None:
        """Make what can be made; cheap when it is there.

        Raises:
            FileNotFoundError: A file or folder is missing and nothing makes it.
        """
        prepare_files(self.annotations, (self.images, self.segments), self.make)

    def __call__(
        self,
        *,
        image_size: int,
        patch: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        crop_size: int | None = None,
    ) -> RegionImages:
        """The regions at an evaluator's image size, with `crop_size` also crops of that size.

        Raises:
            FileNotFoundError: Images are missing.
            ValueError: The annotation file is damaged, or no region is left.
        """
        self.prepare()
        categories, listed = read_regions(Path(self.annotations))
        pictures = subset(listed, self.limit, self.limit_seed)
        folder = Path(self.images)
        require_images(folder, [(picture.id, picture.file_name) for picture in pictures])
        self._require_segments(pictures)
        skipped: Counter[str] = Counter()
        chosen = [(picture, self._choose(picture, skipped)) for picture in pictures]
        if not any(regions for _, regions in chosen):
            raise ValueError(f"{self.annotations} has no region that counts; skipped: {skipped}")
        skipped["image without regions"] = sum(not regions for _, regions in chosen)
        return RegionImages(
            annotations=Path(self.annotations),
            images=folder,
            segments=None if self.segments is None else Path(self.segments),
            mask_antialias=self.mask_antialias,
            categories=categories,
            pictures=[(picture, regions) for picture, regions in chosen if regions],
            skipped={cause: count for cause, count in skipped.items() if count},
            image_size=image_size,
            patch=patch,
            mean=mean,
            std=std,
            fit=self.fit,
            crop_size=crop_size,
            crop_scale=self.crop_scale,
        )

    def _require_segments(self, pictures: Sequence[CocoImage]) -> None:
        """PNGs for panoptic files, none for instance files."""
        named = [(entry.id, entry.segments) for entry in pictures if entry.segments is not None]
        if self.segments is not None and not named:
            raise ValueError(f"{self.annotations} is no panoptic file; leave segments= out")
        if self.segments is None and named:
            raise ValueError(
                f"{self.annotations} is a panoptic file; name the folder of its PNGs as segments="
            )
        if self.segments is not None:
            require_images(Path(self.segments), named)

    def _choose(self, picture: CocoImage, skipped: Counter[str]) -> list[Region]:
        """Regions of an image that count, in file order; counts the others by cause."""
        kept = []
        for position, region in enumerate(picture.regions):
            cause = self._objection(picture, region, position)
            if cause is None:
                kept.append(region)
            else:
                skipped[cause] += 1
        return kept

    def _objection(self, picture: CocoImage, region: Region, position: int) -> str | None:
        x, y, width, height = region.box
        if position >= self.max_regions:
            return "beyond the maximum per image"
        if region.crowd and not self.crowd:
            return "crowd"
        if width <= 0 or height <= 0:
            return "box without area"
        if x >= picture.width or y >= picture.height or x + width <= 0 or y + height <= 0:
            return "box outside the image"
        return "small" if width * height < self.min_area else None
