"""Pictures whose objects have attributes in words: the shapes world, and CLEVR's scene files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradeclip_ft.batch import RegionBatch
from gradeclip_ft.data.coco import Region
from gradeclip_ft.data.files import load_json, require_images, subset, subset_protocol
from gradeclip_ft.data.label_maps import read_labels, resize_labels
from gradeclip_ft.data.loading import evaluation_loader
from gradeclip_ft.data.regions import (
    CocoRegions,
    RegionImages,
    RegionSample,
    join_regions,
    letterbox_size,
    sample_of_masks,
)
from gradeclip_ft.data.shapes_scenes import LARGE, SMALL
from gradeclip_ft.images import read_image

ATTRIBUTES = ("color", "shape", "material", "size", "location")
RADIUS = {"large": 0.7, "small": 0.35}  # of CLEVR's objects, in its units
FOCAL = 35 / 32  # focal length of its camera over the width of its film


@dataclass(frozen=True)
class ObjectImages:
    """Letterboxed pictures with a mask of every object.

    Attributes:
        pictures: A region per object; its label says nothing here.
        attributes: Word by attribute of each object of each picture, in the order of its regions.
    """

    pictures: RegionImages | ClevrImages
    attributes: Sequence[Sequence[Mapping[str, str]]]


@dataclass(frozen=True)
class ShapesObjects:
    """Coloured shapes: colour and shape by name, size and place by the box.

    Attributes:
        regions: Where they are.
    """

    regions: CocoRegions

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        return {**self.regions.protocol, "attributes": "of name and box"}

    def prepare(self) -> None:
        """Make what can be made; cheap when it is there."""
        self.regions.prepare()

    def __call__(self, **settings: Any) -> ObjectImages:
        """The pictures at an evaluator's image size."""
        found = self.regions(**settings)
        described = [
            [_described(found.classes[region.label], region, image.width) for region in regions]
            for image, regions in found.chosen
        ]
        return ObjectImages(found, described)


def _described(name: str, region: Region, side: int) -> dict[str, str]:
    """Words of one coloured shape; the middle has no place, a medium object no size."""
    colour, shape = name.split()
    x, y, width, height = (length / side for length in region.box)
    radius, across, down = max(width, height) / 2, x + width / 2, y + height / 2
    size = "small" if radius < SMALL else "large" if radius > LARGE else ""
    column = "left" if across < 0.4 else "right" if across > 0.6 else ""
    row = "top" if down < 0.4 else "bottom" if down > 0.6 else ""
    words = {"color": colour, "shape": shape, "size": size, "location": column or row}
    return {attribute: word for attribute, word in words.items() if word}


@dataclass(frozen=True)
class ClevrObjects:
    """CLEVR's `scenes/CLEVR_val_scenes.json`: objects with a centre, colour, shape and so on.

    The data have no masks. Without `masks` an object is the disc that its sphere would cover.

    Attributes:
        scenes: The file.
        images: Folder of the images.
        masks: Folder of label maps `NAME.png`, where number n is the n-th object of the scene.
    """

    scenes: str
    images: str
    masks: str | None = None
    limit: int | None = None
    limit_seed: int = 0

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        shape = "discs" if self.masks is None else "label maps"
        told = {"masks": shape, "padding": "does not count"}
        return {**told, **subset_protocol(self.limit, self.limit_seed)}

    def prepare(self) -> None:
        """Check that the file is there."""
        if not Path(self.scenes).is_file():
            raise FileNotFoundError(
                f"no scene file {self.scenes}; unpack CLEVR_v1.0 or set scenes="
            )

    def __call__(self, *, image_size: int, patch: int, mean: Any, std: Any) -> ObjectImages:
        """The pictures at an evaluator's image size; those without objects are left out."""
        del patch
        listed = [scene for scene in load_json(Path(self.scenes))["scenes"] if scene["objects"]]
        scenes = subset(listed, self.limit, self.limit_seed)
        require_images(
            Path(self.images), [(n, scene["image_filename"]) for n, scene in enumerate(scenes)]
        )
        pictures = ClevrImages(self, scenes, image_size, mean, std)
        return ObjectImages(pictures, [_attributes(scene["objects"]) for scene in scenes])


def _attributes(objects: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Own attributes of CLEVR's objects, and `location`: left or right of the picture's middle."""
    return [
        {
            **{name: str(thing[name]) for name in ATTRIBUTES if name in thing},
            "location": "left" if thing["pixel_coords"][0] < 240 else "right",
        }
        for thing in objects
    ]


@dataclass(frozen=True)
class ClevrImages(Dataset[RegionSample]):
    """One letterboxed scene with a mask of every object per item."""

    source: ClevrObjects
    scenes: Sequence[Mapping[str, Any]]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def files(self) -> list[Path]:
        """The scene file, which a fingerprint reads."""
        return [Path(self.source.scenes)]

    @property
    def listed(self) -> list[Path]:
        """Images, which a fingerprint lists."""
        return [Path(self.source.images) / scene["image_filename"] for scene in self.scenes]

    @property
    def counts(self) -> dict[str, Any]:
        """Number of images and objects."""
        objects = sum(len(scene["objects"]) for scene in self.scenes)
        return {"images": len(self.scenes), "objects": objects}

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> RegionSample:
        """Letterboxed scene number `index`."""
        scene, side = self.scenes[index], self.image_size
        image = read_image(Path(self.source.images) / scene["image_filename"], exif=False)
        height, width = letterbox_size(image.height, image.width, side)
        count = len(scene["objects"])
        masks, padding = torch.zeros(count, side, side), torch.ones(side, side, dtype=torch.bool)
        padding[:height, :width] = False
        if self.source.masks is None:
            scale = width / image.width
            for mask, thing in zip(masks, scene["objects"], strict=True):
                mask[:height, :width] = _disc(thing, image.width, (height, width), scale)
        else:
            path = (Path(self.source.masks) / scene["image_filename"]).with_suffix(".png")
            found = resize_labels(read_labels(path), (width, height))
            masks[:, :height, :width] = (found == torch.arange(1, count + 1).view(-1, 1, 1)).float()
        return sample_of_masks(image, masks, torch.arange(count), padding, self.mean, self.std)

    def batches(self, batch_size: int, workers: int) -> DataLoader[RegionBatch]:
        """All scenes once, in order; leaves torch's global random state alone."""
        return evaluation_loader(self, join_regions, batch_size=batch_size, workers=workers)


def _disc(
    thing: Mapping[str, Any], photo_width: int, size: tuple[int, int], scale: float
) -> Float[Tensor, "h w"]:
    """What a sphere of the object's size covers: focal length · radius / distance."""
    x, y, distance = thing["pixel_coords"]
    radius = FOCAL * photo_width * RADIUS[thing["size"]] / distance
    rows, columns = ((torch.arange(length) + 0.5) / scale for length in size)
    disc: Tensor = torch.hypot(rows.unsqueeze(1) - y, columns - x) <= radius
    return disc.float()
