"""Images whose every pixel has a class: folders of label maps, and COCO's panoptic files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F  # noqa: N812

from gradeclip_ft.data.coco import CocoImage, read_regions, read_segment_ids
from gradeclip_ft.data.files import prepare_files, require_images, subset, subset_protocol
from gradeclip_ft.data.loading import evaluation_loader
from gradeclip_ft.images import read_image
from gradeclip_ft.results.record import hash_json
from gradeclip_ft.text.prompts import readable_name

IGNORED = 255
"""Label of pixels that do not count."""

BACKGROUND = "background"
"""Name of the first class where there is one that stands for everything unnamed."""

Classes = Mapping[str, Sequence[str] | None]
"""Names of the classes in order of their labels, each with the words to look for (none: itself)."""


@dataclass(frozen=True)
class Resize:
    """The shorter side brought to so many pixels, the longer one in proportion.

    Bilinear as OpenCV and mmseg do it, without antialias and sides rounded; bicubic as torchvision
    does it on pictures, with antialias and the longer side cut off (TIPS).
    """

    side: int
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "3 H W"]:
        """The picture's pixels at that size."""
        planes: Tensor = F.pil_to_tensor(image)
        scale, cubic = self.side / min(image.size), self.interpolation == "bicubic"
        size = tuple(
            self.side if side == min(image.size) else int(side * scale + (0.0 if cubic else 0.5))
            for side in (image.height, image.width)
        )
        if size == (image.height, image.width):
            return planes
        if cubic:
            mode = F.InterpolationMode.BICUBIC
            smaller: Tensor = F.pil_to_tensor(F.resize(image, list(size), interpolation=mode))
            return smaller
        resized = interpolate(planes[None].float(), size, mode="bilinear", align_corners=False)
        return resized[0].round().byte()


@dataclass(frozen=True)
class LabelMap:
    """A file with one number for each pixel, and the label of each number."""

    path: Path
    table: UInt8[ndarray, " 256"]

    def __call__(self) -> UInt8[ndarray, "H W"]:
        """Labels of all pixels; a ValueError where the file holds colours."""
        with Image.open(self.path) as stored:
            if stored.mode not in ("L", "P"):
                raise ValueError(
                    f"{self.path} holds {stored.mode} pixels, expected one number of 8 bits each; "
                    "give the folder of the label maps, not of their pictures"
                )
            found: UInt8[ndarray, "H W"] = self.table[np.asarray(stored)]
        return found


@dataclass(frozen=True)
class PanopticMap:
    """A panoptic PNG with the segments of its image; pixels of none of them are ignored."""

    image: CocoImage
    folder: Path
    table: UInt8[ndarray, " K"]

    def __call__(self) -> UInt8[ndarray, "H W"]:
        """Labels of all pixels."""
        assert self.image.segments is not None
        ids = read_segment_ids(self.folder / self.image.segments)
        found = np.full(ids.shape, IGNORED, np.uint8)
        for region in self.image.regions:
            found[ids == region.id] = self.table[region.label]
        return found


@dataclass(frozen=True)
class SegmentationSample:
    """One picture: its pixels as read and at each size, and its labels at the original size."""

    photo: Image.Image
    pixels: Mapping[Resize, Float[Tensor, "3 _ _"]]
    truth: UInt8[Tensor, "H W"]


@dataclass(frozen=True)
class SegmentationImages(Dataset[tuple[Image.Image, UInt8[ndarray, "H W"]]]):
    """Pictures with their labels.

    Attributes:
        images: Files.
        maps: Where the labels of each are.
        queries: Words for each class, by its name, in order of the labels.
        files: Annotation files, which a fingerprint reads.
        listed: Pictures and label maps, which a fingerprint lists.
    """

    images: Sequence[Path]
    maps: Sequence[LabelMap | PanopticMap]
    queries: Mapping[str, Sequence[str]]
    files: Sequence[Path]
    listed: Sequence[Path]

    @property
    def classes(self) -> list[str]:
        """Names of the classes in order of the labels."""
        return list(self.queries)

    @property
    def has_background(self) -> bool:
        """Whether the first class is what none of the others is."""
        return self.classes[0] == BACKGROUND

    @property
    def names(self) -> list[str]:
        """File names of the pictures."""
        return [path.name for path in self.images]

    @cached_property
    def labels(self) -> set[int]:
        """Those that occur; reads all label maps."""
        found: set[int] = set()
        for read in self.maps:
            found |= {*np.unique(read()).tolist()} - {IGNORED}
        return found

    @property
    def counts(self) -> dict[str, Any]:
        """What counts."""
        return {"images": len(self.images), "classes": len(self.queries)}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, UInt8[ndarray, "H W"]]:
        """Picture number `index` and its labels; a ValueError where their sizes differ."""
        photo, truth = read_image(self.images[index], exif=False), self.maps[index]()
        if truth.shape != (photo.height, photo.width):
            raise ValueError(
                f"{self.images[index]} has {photo.height} x {photo.width} pixels (height x width), "
                f"its label map {truth.shape[0]} x {truth.shape[1]}; they belong to different "
                "pictures, or one of them was resized"
            )
        return photo, truth

    def batches(
        self,
        sizes: Sequence[Resize],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        batch_size: int,
        workers: int,
    ) -> DataLoader[list[SegmentationSample]]:
        """All pictures once, in order, each at every size."""
        join = partial(_join, sizes, mean, std)
        return evaluation_loader(self, join, batch_size=batch_size, workers=workers)


def hash_queries(queries: Mapping[str, Sequence[str]]) -> str:
    """Hash of classes and their words, in order: it decides which label is which."""
    return hash_json([[name, list(words)] for name, words in queries.items()])


def _join(
    sizes: Sequence[Resize],
    mean: Sequence[float],
    std: Sequence[float],
    items: Sequence[tuple[Image.Image, UInt8[ndarray, "_ _"]]],
) -> list[SegmentationSample]:
    return [
        SegmentationSample(
            photo,
            {size: F.normalize(size(photo).float() / 255, list(mean), list(std)) for size in sizes},
            torch.from_numpy(truth),
        )
        for photo, truth in items
    ]


@dataclass(frozen=True)
class LabelFolder:
    """Pictures in one folder, label maps of the same names in another.

    Attributes:
        images: Folder of the pictures.
        labels: Folder of the label maps, PNGs with a class number for each pixel.
        classes: Names of the classes in order, each with the words to look for.
        split: What the pictures are, for the protocol.
        listing: File with the names of the pictures that count, one a line; None for all that
            have a label map.
        image_suffix: End of a picture's name.
        label_suffix: End of its label map's.
        ids: Numbers of the classes in the files, null for one that has none (a background that is
            the rest); None for `first` and those after it.
        first: Number of the first class.
        rest: Label of every other number: 255 to ignore those pixels.
    """

    images: str
    labels: str
    classes: Classes
    split: str
    listing: str | None = None
    image_suffix: str = ".jpg"
    label_suffix: str = ".png"
    ids: Sequence[int | None] | None = None
    first: int = 0
    rest: int = IGNORED
    limit: int | None = None
    limit_seed: int = 0

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        return {
            "split": self.split,
            "class_list_hash": hash_queries(self._queries()),
            **subset_protocol(self.limit, self.limit_seed),
        }

    def prepare(self) -> None:
        """Check that both folders are there."""
        for folder in (self.images, self.labels):
            if not Path(folder).is_dir():
                raise FileNotFoundError(
                    f"no folder {folder}; fetch the data (docs/data.md) or set images= and labels="
                )

    def __call__(self) -> SegmentationImages:
        """The pictures that count; a ValueError for more classes than numbers."""
        self.prepare()
        ids = self.ids or range(self.first, self.first + len(self.classes))
        if len(ids) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes have {len(ids)} ids; give one each")
        table = np.full(256, self.rest, np.uint8)
        for label, number in enumerate(ids):
            if number is not None:
                table[number] = label
        names = subset(self._names(), self.limit, self.limit_seed)
        missing = f"no label map *{self.label_suffix} in {self.labels}, or none that is listed"
        if not names:
            raise FileNotFoundError(f"{missing}; set labels=, label_suffix= and listing=")
        images = [name + self.image_suffix for name in names]
        require_images(Path(self.images), list(enumerate(images)))
        maps = [name + self.label_suffix for name in names]
        require_images(Path(self.labels), list(enumerate(maps)))
        paths = [Path(self.images) / name for name in images]
        return SegmentationImages(
            images=paths,
            maps=[LabelMap(Path(self.labels) / name, table) for name in maps],
            queries=self._queries(),
            files=[] if self.listing is None else [Path(self.listing)],
            listed=[*paths, *(Path(self.labels) / name for name in maps)],
        )

    def _queries(self) -> dict[str, list[str]]:
        return {name: list(words or [name]) for name, words in self.classes.items()}

    def _names(self) -> list[str]:
        """Names without their ends, from the folders down."""
        if self.listing is not None:
            if not Path(self.listing).is_file():
                raise FileNotFoundError(f"no list of pictures {self.listing}; set listing=")
            return Path(self.listing).read_text("utf-8").split()
        root, end = Path(self.labels), self.label_suffix
        found = (path.relative_to(root).as_posix() for path in root.rglob(f"*{end}"))
        return sorted(name.removesuffix(end) for name in found if "/." not in f"/{name}")


@dataclass(frozen=True)
class PanopticLabels:
    """Things and stuff of a panoptic file as one map of labels.

    Attributes:
        annotations: The panoptic file.
        images: Folder of the pictures.
        segments: Folder of the panoptic PNGs.
        split: What the pictures are, for the protocol.
        stuff: Stuff classes are classes of their own; or one class, background, whose words are
            their names; or ignored.
    """

    annotations: str
    images: str
    segments: str
    split: str
    stuff: Literal["classes", "background", "ignored"] = "classes"
    limit: int | None = None
    limit_seed: int = 0
    world: int = 1
    make: Callable[[], object] | None = None

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        return {
            "split": self.split,
            "stuff": self.stuff,
            **subset_protocol(self.limit, self.limit_seed),
            **({} if self.world == 1 else {"world": self.world}),
        }

    def prepare(self) -> None:
        """Make what can be made; cheap when it is there."""
        prepare_files(self.annotations, (self.images, self.segments), self.make)

    def __call__(self) -> SegmentationImages:
        """The pictures that count."""
        self.prepare()
        categories, listed = read_regions(Path(self.annotations))
        pictures = subset(listed, self.limit, self.limit_seed)
        named = [(image.id, image.segments) for image in pictures if image.segments is not None]
        if len(named) < len(pictures):
            raise ValueError(f"{self.annotations} is not a panoptic file; segments need one")
        require_images(Path(self.images), [(image.id, image.file_name) for image in pictures])
        require_images(Path(self.segments), named)
        queries: dict[str, list[str]] = {}
        if self.stuff == "background":
            queries[BACKGROUND] = [readable_name(c.name) for c in categories if not c.is_thing]
        table = np.full(len(categories), IGNORED, np.uint8)
        for row, category in enumerate(categories):
            if category.is_thing or self.stuff == "classes":
                table[row] = len(queries)
                queries[category.name] = [readable_name(category.name)]
            elif self.stuff == "background":
                table[row] = 0
        paths = [Path(self.images) / image.file_name for image in pictures]
        folder = Path(self.segments)
        return SegmentationImages(
            images=paths,
            maps=[PanopticMap(image, folder, table) for image in pictures],
            queries=queries,
            files=[Path(self.annotations)],
            listed=[*paths, *(folder / name for _, name in named)],
        )
