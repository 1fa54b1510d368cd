"""Labelled regions of COCO files in letterboxed images, by the protocol of Grad-ECLIP's Table 7.

Panoptic files give boxes and masks of things and stuff, instance files those of things.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F  # noqa: N812

from gradeclip_ft.batch import RegionBatch
from gradeclip_ft.data.coco import Category, CocoImage, Region, read_regions, region_masks
from gradeclip_ft.data.files import prepare_files, require_images, subset, subset_protocol
from gradeclip_ft.data.loading import evaluation_loader


def letterbox_size(height: int, width: int, side: int, *, squash: bool = False) -> tuple[int, int]:
    """(height, width) of the content in a square of `side`, at least 1 each; all of it if squashed.

    >>> letterbox_size(480, 640, 224)
    (168, 224)
    """
    if squash:
        return side, side
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def letterbox_image(
    image: Image.Image, side: int, *, centred: bool = False, squash: bool = False
) -> Image.Image:
    """Resize bicubically and pad with black, right and below or on all sides."""
    height, width = letterbox_size(image.height, image.width, side, squash=squash)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if height == width == side:
        return image
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - width) // 2, (side - height) // 2) if centred else (0, 0))
    return square


def normalized(
    square: Image.Image, mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "3 S S"]:
    """Pixels of a picture, normalised by channel."""
    planes = F.to_dtype(F.pil_to_tensor(square), torch.float32, scale=True)
    pixels: Tensor = F.normalize(planes, list(mean), list(std))
    return pixels


def letterbox_boxes(
    boxes: Float[Tensor, "R 4"], *, height: int, width: int, squash: bool = False
) -> Float[Tensor, "R 4"]:
    """Boxes as xyxy in [0, 1] of the padded or squashed square.

    Args:
        boxes: (x, y, width, height) in pixels of the original image.
        height: Of the original image.
        width: Of the original image.
        squash: Both sides were brought to that of the square.
    """
    sides = [width, height] * 2 if squash else [max(height, width)] * 4
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1) / boxes.new_tensor(sides)


def letterbox_masks(
    masks: Shaped[Tensor, "R H W"], cells: int, *, antialias: bool, squash: bool = False
) -> Float[Tensor, "R h w"]:
    """Masks on the patch grid of the padded square: 1 where the bicubic resize is above 0.

    The masks are resized directly to the grid, like the image to its pixels.

    Args:
        masks: 1 inside, at the original size.
        cells: Side of the square grid.
        antialias: Torchvision 0.17 and later antialias by default, earlier releases do not; with it
            no object vanishes, but each swells to 7 cells or more.
        squash: Bring both sides to that of the grid, without padding.
    """
    height, width = letterbox_size(masks.shape[1], masks.shape[2], cells, squash=squash)
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
    masks: Float[Tensor, "R h w"] | None
    labels: Int[Tensor, " R"]
    is_thing: Bool[Tensor, " R"]
    crops: Float[Tensor, "R 3 S S"] | None = None
    ignored: Bool[Tensor, "H W"] | None = None


def sample_of_masks(
    image: Image.Image,
    masks: Shaped[Tensor, "R S S"],
    labels: Int[Tensor, " R"],
    ignored: Bool[Tensor, "S S"],
    mean: Sequence[float],
    std: Sequence[float],
) -> RegionSample:
    """A photo whose regions are things that have masks on the padded square, and boxes by these."""
    side = len(ignored)
    return RegionSample(
        image=normalized(letterbox_image(image, side), mean, std),
        boxes=letterbox_boxes(tight_boxes(masks), height=side, width=side),
        masks=masks.float(),
        labels=labels,
        is_thing=torch.ones(len(labels), dtype=torch.bool),
        ignored=ignored,
    )


CROP_SCALE = 1.5
"""Crops of things are their boxes enlarged by this factor, as in CLIPSelf's program."""


@dataclass(frozen=True)
class RegionImages(Dataset[RegionSample]):
    """One letterboxed image with its regions per item.

    Attributes:
        categories: In order of the labels.
        chosen: Images with the regions that count.
        skipped: Left out, by cause.
        has_masks: Whether every region has one.
        image_size: Side of the padded square in pixels.
        patch: Side of a cell in pixels.
        crop_size: Side in pixels of a crop of each region; None for no crops.
    """

    source: CocoRegions
    categories: Sequence[Category]
    chosen: Sequence[tuple[CocoImage, Sequence[Region]]]
    skipped: dict[str, int]
    has_masks: bool
    image_size: int
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_size: int | None

    @property
    def classes(self) -> list[str]:
        """Class names in order of the labels."""
        return [category.name for category in self.categories]

    @property
    def labels(self) -> list[int]:
        """Of all regions."""
        return [region.label for _, regions in self.chosen for region in regions]

    @property
    def names(self) -> list[str]:
        """File names of the images."""
        return [image.file_name for image, _ in self.chosen]

    @property
    def images(self) -> list[Path]:
        """Files of the images."""
        return [Path(self.source.images) / name for name in self.names]

    @property
    def files(self) -> list[Path]:
        """Annotation files, which a fingerprint reads."""
        return [Path(self.source.annotations)]

    @property
    def listed(self) -> list[Path]:
        """Images and masks, which a fingerprint lists."""
        if self.source.segments is None:
            return self.images
        names = [image.segments for image, _ in self.chosen if image.segments is not None]
        return self.images + [Path(self.source.segments) / name for name in names]

    @property
    def counts(self) -> dict[str, Any]:
        """Images and regions that count, and those left out."""
        things = sum(self.categories[label].is_thing for label in self.labels)
        return {
            "images": len(self.chosen),
            "things": things,
            "stuff": len(self.labels) - things,
            "skipped": self.skipped,
        }

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> RegionSample:
        """Letterboxed image number `index`."""
        source, side, (annotated, regions) = self.source, self.image_size, self.chosen[index]
        image, height, width = annotated.read(source.images), annotated.height, annotated.width
        boxes = torch.tensor([region.box for region in regions])
        is_thing = torch.tensor([self.categories[region.label].is_thing for region in regions])
        masks = None
        if self.has_masks:
            folder = None if source.segments is None else Path(source.segments)
            full = torch.from_numpy(region_masks(annotated, regions, folder))
            boxes[~is_thing] = tight_boxes(full[~is_thing])
            if source.clipself:  # its mask2box says (x1 - x0, y1 - y0) of the outermost pixels
                boxes[~is_thing, 2:] -= 1
            cells = side // self.patch
            masks = letterbox_masks(
                full, cells, antialias=source.mask_antialias, squash=source.squash
            )
        padding = torch.ones(side, side, dtype=torch.bool)
        high, wide = letterbox_size(height, width, side, squash=source.squash)
        padding[:high, :wide] = False
        return RegionSample(
            image=normalized(
                letterbox_image(image, side, squash=source.squash), self.mean, self.std
            ),
            boxes=letterbox_boxes(boxes, height=height, width=width, squash=source.squash),
            masks=masks,
            labels=torch.tensor([region.label for region in regions]),
            is_thing=is_thing,
            crops=None if self.crop_size is None else self._crops(image, boxes, is_thing),
            ignored=padding,
        )

    def _crops(
        self, image: Image.Image, boxes: Float[Tensor, "R 4"], is_thing: Bool[Tensor, " R"]
    ) -> Float[Tensor, "R 3 S S"]:
        """Each region alone, at least one pixel of it; boxes of things are enlarged."""
        assert self.crop_size is not None
        source, crops = self.source, []
        for (x, y, width, height), thing in zip(boxes.tolist(), is_thing.tolist(), strict=True):
            more = (CROP_SCALE - 1) / 2 if thing else 0.0
            edges = (
                max(0.0, x - more * width),
                max(0.0, y - more * height),
                min(float(image.width), x + width + more * width),
                min(float(image.height), y + height + more * height),
            )
            if source.clipself:  # its program leaves the rounding to PIL: half to even
                left, top, right, bottom = map(round, edges)
            else:
                left, top = int(edges[0]), int(edges[1])
                right, bottom = math.ceil(edges[2]), math.ceil(edges[3])
            crop = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
            square = letterbox_image(crop, self.crop_size, centred=source.clipself)
            crops.append(normalized(square, self.mean, self.std))
        return torch.stack(crops)

    def batches(self, batch_size: int, workers: int) -> DataLoader[RegionBatch]:
        """All regions once, in file order; leaves torch's global random state alone."""
        return evaluation_loader(self, join_regions, batch_size=batch_size, workers=workers)


def join_regions(samples: Sequence[RegionSample]) -> RegionBatch:
    """Images of one batch with their regions flat."""
    counts = torch.tensor([len(sample.labels) for sample in samples])
    masks = [sample.masks for sample in samples if sample.masks is not None]
    crops = [sample.crops for sample in samples if sample.crops is not None]
    ignored = [sample.ignored for sample in samples if sample.ignored is not None]
    return RegionBatch(
        images=torch.stack([sample.image for sample in samples]),
        boxes=torch.cat([sample.boxes for sample in samples]),
        masks=torch.cat(masks) if masks else None,
        labels=torch.cat([sample.labels for sample in samples]),
        is_thing=torch.cat([sample.is_thing for sample in samples]),
        owner=torch.arange(len(samples)).repeat_interleave(counts),
        crops=torch.cat(crops) if crops else None,
        ignored=torch.stack(ignored) if ignored else None,
    )


@dataclass(frozen=True)
class CocoRegions:
    """Where regions are and which of them count.

    Attributes:
        annotations: A panoptic or an instances file.
        images: Folder of the images.
        segments: Folder of the panoptic PNGs; None for an instances file.
        min_area: Regions whose box has fewer pixels (of the original image) are left out.
        max_regions: Regions per image; further ones are left out.
        crowd: Keep regions that are groups (`iscrowd`).
        mask_antialias: Antialias when masks are resized to the patch grid.
        squash: Bring both sides to that of the square (FG-CLIP), instead of padding.
        clipself: Crops and boxes of stuff exactly as CLIPSelf's program cuts them: crops are
            padded on all sides and their edges rounded, boxes of stuff end at the last pixel
            instead of after it.
    """

    annotations: str
    images: str
    segments: str | None = None
    min_area: int = 64
    max_regions: int = 100
    crowd: bool = True
    mask_antialias: bool = True
    squash: bool = False
    clipself: bool = False
    limit: int | None = None
    limit_seed: int = 0
    world: int = 1
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
            "letterbox": "bicubic, squashed to the square"
            if self.squash
            else "bicubic, padded right and below with black",
            **({"crops_and_stuff_boxes": "as CLIPSelf's program"} if self.clipself else {}),
            **subset_protocol(self.limit, self.limit_seed),
            **({} if self.world == 1 else {"world": self.world}),
        }

    def prepare(self) -> None:
        """Make what can be made; cheap when it is there."""
        prepare_files(self.annotations, (self.images, self.segments), self.make)

    def __call__(
        self,
        *,
        image_size: int = 32,
        patch: int = 32,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
        crop_size: int | None = None,
    ) -> RegionImages:
        """The regions at an evaluator's image size, with `crop_size` also crops of that size.

        The defaults are for whoever looks at the data without a model.
        """
        self.prepare()
        categories, listed = read_regions(Path(self.annotations))
        images = subset(listed, self.limit, self.limit_seed)
        require_images(Path(self.images), [(image.id, image.file_name) for image in images])
        self._require_segments(images)
        skipped: Counter[str] = Counter()
        chosen = [(image, self._choose(image, skipped)) for image in images]
        if not any(regions for _, regions in chosen):
            raise ValueError(f"{self.annotations} has no region that counts; skipped: {skipped}")
        skipped["image without regions"] = sum(not regions for _, regions in chosen)
        maskless = 0
        if self.segments is None:
            maskless = sum(region.outline is None for _, some in chosen for region in some)
            skipped["masks, because regions have none"] = maskless
        return RegionImages(
            source=replace(self, make=None),  # which may not cross to workers
            categories=categories,
            chosen=[(image, regions) for image, regions in chosen if regions],
            skipped=dict(+skipped),
            has_masks=maskless == 0,
            image_size=image_size,
            patch=patch,
            mean=mean,
            std=std,
            crop_size=crop_size,
        )

    def _require_segments(self, images: Sequence[CocoImage]) -> None:
        """PNGs for panoptic files, none for instance files."""
        named = [(image.id, image.segments) for image in images if image.segments is not None]
        if self.segments is None:
            if named:
                raise ValueError(
                    f"{self.annotations} is a panoptic file; name the folder of its PNGs as "
                    "segments="
                )
            return
        if not named:
            raise ValueError(f"{self.annotations} is not a panoptic file; leave segments= out")
        require_images(Path(self.segments), named)

    def _choose(self, image: CocoImage, skipped: Counter[str]) -> list[Region]:
        """Regions of an image that count, in file order; counts the others by cause."""
        kept = []
        for position, region in enumerate(image.regions):
            x, y, width, height = region.box
            if position >= self.max_regions:
                skipped["beyond the maximum per image"] += 1
            elif region.crowd and not self.crowd:
                skipped["crowd"] += 1
            elif width <= 0 or height <= 0:
                skipped["box without area"] += 1
            elif x >= image.width or y >= image.height or x + width <= 0 or y + height <= 0:
                skipped["box outside the image"] += 1
            elif width * height < self.min_area:
                skipped["small"] += 1
            else:
                kept.append(region)
        return kept
