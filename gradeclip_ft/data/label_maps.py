"""Pictures with a class at every pixel, as regions: PASCAL VOC and ImageNet-S.

Each class of a picture is one region. Void pixels, and the padding of the letterboxed square, do
not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradeclip_ft.batch import RegionBatch
from gradeclip_ft.data.files import subset, subset_protocol, visible
from gradeclip_ft.data.loading import evaluation_loader
from gradeclip_ft.data.regions import RegionSample, join_regions, letterbox_size, sample_of_masks
from gradeclip_ft.images import read_image

VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
IMAGES = (".jpg", ".jpeg", ".JPEG", ".JPG", ".png")


@dataclass(frozen=True)
class LabelMapImages(Dataset[RegionSample]):
    """One letterboxed picture with a mask of every class in it per item.

    Attributes:
        classes: Names in order of the labels; a pixel's number is the label plus one.
        pairs: Picture and label map of each item.
        void: Numbers that do not count.
        image_size: Side of the padded square in pixels.
    """

    classes: Sequence[str]
    pairs: Sequence[tuple[Path, Path]]
    void: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    files: Sequence[Path] = ()

    @property
    def names(self) -> list[str]:
        """File names of the pictures."""
        return [path.name for path, _ in self.pairs]

    @property
    def listed(self) -> list[Path]:
        """Pictures and label maps, which a fingerprint lists."""
        return [path for pair in self.pairs for path in pair]

    @property
    def counts(self) -> dict[str, Any]:
        """Number of pictures."""
        return {"images": len(self.pairs)}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> RegionSample:
        """Letterboxed picture number `index`."""
        path, where = self.pairs[index]
        image, numbers = read_image(path, exif=False), read_labels(where)
        if (image.height, image.width) != tuple(numbers.shape):
            raise ValueError(
                f"{path} has {image.height} x {image.width} pixels (height x width), {where} has "
                f"{' x '.join(map(str, numbers.shape))}"
            )
        side = self.image_size
        height, width = letterbox_size(image.height, image.width, side)
        square = torch.full((side, side), self.void)
        square[:height, :width] = resize_labels(numbers, (width, height))
        labels = torch.unique(numbers) - 1
        labels = labels[(labels >= 0) & (labels != self.void - 1)]
        if len(labels) and int(labels.max()) >= len(self.classes):
            raise ValueError(
                f"{where} has class {int(labels.max()) + 1}, expected 0 to {len(self.classes)} or "
                f"{self.void} for void; label maps and classes must be of one data set"
            )
        masks = square == labels.view(-1, 1, 1) + 1
        return sample_of_masks(image, masks, labels, square == self.void, self.mean, self.std)

    def batches(self, batch_size: int, workers: int) -> DataLoader[RegionBatch]:
        """All pictures once, in order; leaves torch's global random state alone."""
        return evaluation_loader(self, join_regions, batch_size=batch_size, workers=workers)


def read_labels(path: Path) -> Int[Tensor, "H W"]:
    """Numbers of a label map: palette index or grey value, or R + 256 G of a coloured one."""
    with Image.open(path) as image:
        stored = np.asarray(image).astype(np.int64)
    numbers = stored if stored.ndim == 2 else stored[..., 0] + 256 * stored[..., 1]
    return torch.from_numpy(numbers)


def resize_labels(numbers: Int[Tensor, "H W"], size: tuple[int, int]) -> Int[Tensor, "h w"]:
    """A label map at another (width, height): numbers have no mean, so the nearest one counts."""
    found = Image.fromarray(numbers.numpy().astype(np.int32)).resize(size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(found).copy()).long()


@dataclass(frozen=True)
class VocMasks:
    """PASCAL VOC: `JPEGImages`, `SegmentationClass`, `ImageSets/Segmentation/SPLIT.txt`.

    Attributes:
        folder: `VOCdevkit/VOC2012`.
        split: Name of the list.
    """

    folder: str
    split: str = "val"
    limit: int | None = None
    limit_seed: int = 0

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        return {"split": f"VOC {self.split}", **subset_protocol(self.limit, self.limit_seed)}

    def prepare(self) -> None:
        """Check that the list is there."""
        self._list()

    def __call__(self, *, image_size: int, patch: int, mean: Any, std: Any) -> LabelMapImages:
        """The pictures of the split at an evaluator's image size; masks are at pixels."""
        del patch
        root, listed = Path(self.folder), self._list()
        names = subset(listed.read_text().split(), self.limit, self.limit_seed)
        pairs = [
            (root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png")
            for name in names
        ]
        _require(pairs)
        return LabelMapImages(VOC, pairs, 255, image_size, mean, std, files=[listed])

    def _list(self) -> Path:
        path = Path(self.folder) / "ImageSets" / "Segmentation" / f"{self.split}.txt"
        if not path.is_file():
            raise FileNotFoundError(
                f"no list {path}; unpack VOCtrainval_11-May-2012 or set folder="
            )
        return path


@dataclass(frozen=True)
class ImageNetSMasks:
    """ImageNet-S: `PART/WNID/*.JPEG` and `PART-segmentation/WNID/*.png`, numbers by sorted WNID.

    Attributes:
        folder: `ImageNetS919`, `ImageNetS300` or `ImageNetS50`.
        part: Its part.
        classes: Number of classes there must be; any other number is refused.
    """

    folder: str
    part: str = "validation"
    classes: int | None = 919
    limit: int | None = None
    limit_seed: int = 0

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        return {
            "split": f"{Path(self.folder).name} {self.part}",
            **subset_protocol(self.limit, self.limit_seed),
        }

    def prepare(self) -> None:
        """Check that the folders are there."""
        self._folders()

    def __call__(self, *, image_size: int, patch: int, mean: Any, std: Any) -> LabelMapImages:
        """The pictures at an evaluator's image size; classes are WordNet ids, masks at pixels."""
        del patch
        folders = self._folders()
        found = []
        for folder in folders:
            for mask in visible(folder.glob("*.png")):
                near = Path(self.folder) / self.part / folder.name / mask.stem
                image = next((p for s in IMAGES if (p := near.with_suffix(s)).is_file()), None)
                found.append((image or near.with_suffix(IMAGES[2]), mask))
        pairs = subset(found, self.limit, self.limit_seed)
        _require(pairs)
        names = [folder.name for folder in folders]
        return LabelMapImages(names, pairs, 1000, image_size, mean, std)

    def _folders(self) -> list[Path]:
        root = Path(self.folder) / f"{self.part}-segmentation"
        folders = [path for path in visible(root.glob("*")) if path.is_dir()]
        if not folders:
            raise FileNotFoundError(f"no folder per class in {root}; unpack it or set folder=")
        if self.classes is not None and len(folders) != self.classes:
            raise ValueError(
                f"{root} has {len(folders)} folders, there must be {self.classes} classes: numbers "
                "are the ranks of the sorted names, so every class needs its folder"
            )
        return folders


def _require(pairs: Sequence[tuple[Path, Path]]) -> None:
    missing = [path for pair in pairs for path in pair if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} files of {len(pairs)} pictures and label maps are missing, first "
            f"{missing[0]}; pictures and label maps have the same names"
        )
