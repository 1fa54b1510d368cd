"""Which labelled regions of COCO files count, by the protocol of Grad-ECLIP's Table 7.

Panoptic files give boxes and masks of things and stuff, instance files those of things.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradeclip_ft.data.coco import Picture, Region, read_regions
from gradeclip_ft.data.files import prepare_files, require_images
from gradeclip_ft.data.letterbox import Fit
from gradeclip_ft.data.region_images import RegionImages
from gradeclip_ft.data.subset import subset, subset_protocol

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

    def _require_segments(self, pictures: Sequence[Picture]) -> None:
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

    def _choose(self, picture: Picture, skipped: Counter[str]) -> list[Region]:
        """Regions of an image that count, in file order; counts the others by cause."""
        kept = []
        for position, region in enumerate(picture.regions):
            cause = self._objection(picture, region, position)
            if cause is None:
                kept.append(region)
            else:
                skipped[cause] += 1
        return kept

    def _objection(self, picture: Picture, region: Region, position: int) -> str | None:
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
