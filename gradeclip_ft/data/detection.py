"""Boxes of COCO files for detectors: classes split in base and novel, training and test images.

The split of OV-COCO (Bansal et al., 2018) is made from COCO's own files by category ids: 48 base
and 17 novel classes; the other 15 are left out. In the shapes world base classes are the pairs of
colour and shape that captions name, novel ones the pairs that no caption names.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F  # noqa: N812

from gradeclip_ft.batch import DetectionBatch
from gradeclip_ft.data.coco import Category, CocoImage, Region, read_regions
from gradeclip_ft.data.files import prepare_files, require_images, subset, subset_protocol
from gradeclip_ft.data.loading import evaluation_loader
from gradeclip_ft.data.shapes import make_shapes
from gradeclip_ft.data.shapes_scenes import HELD_OUT, thing_names
from gradeclip_ft.results.record import hash_file, write_atomically

# fmt: off
OV_COCO_BASE = (
    1, 2, 3, 4, 7, 8, 9, 15, 16, 19, 20, 23, 24, 25, 27, 31, 33, 34, 35, 38, 42, 44, 48, 50,
    51, 52, 53, 54, 55, 56, 57, 59, 60, 62, 65, 70, 72, 73, 74, 75, 78, 79, 80, 82, 84, 85, 86, 90,
)
OV_COCO_NOVEL = (5, 6, 17, 18, 21, 22, 28, 32, 36, 41, 47, 49, 61, 63, 76, 81, 87)
# fmt: on
SMALLEST = 0.01
"""Sides in pixels below which a box that a crop cut is left out."""

Split = str | Mapping[str, Sequence[str]]


def split_categories(
    categories: Sequence[Category], split: Split
) -> tuple[list[Category], list[Category]]:
    """Base and novel categories of a file.

    Args:
        categories: Of the file.
        split: "ov_coco", "shapes", or names: {base: [...], novel: [...]}.

    Raises:
        ValueError: A class of the split is not in the file, is in both parts, or there is none.
    """
    if split == "ov_coco":
        by_id = {category.id: category for category in categories}
        missing = [key for key in (*OV_COCO_BASE, *OV_COCO_NOVEL) if key not in by_id]
        if missing:
            raise ValueError(
                f"OV-COCO has 48 base and 17 novel classes, the file lacks those with ids "
                f"{missing}; use COCO's own instances_*.json with 80 classes"
            )
        return [by_id[key] for key in OV_COCO_BASE], [by_id[key] for key in OV_COCO_NOVEL]
    if split == "shapes":
        hidden = {f"{colour} {shape}" for colour, shape in HELD_OUT}
        names = {
            "base": [name for name in thing_names() if name not in hidden],
            "novel": [name for name in thing_names() if name in hidden],
        }
    elif isinstance(split, str) or set(split) != {"base", "novel"}:
        raise ValueError(
            f"split={split!r}: write ov_coco, shapes, or {{base: [names], novel: [names]}}"
        )
    else:
        names = {part: list(split[part]) for part in ("base", "novel")}
    known = {category.name: category for category in categories}
    listed = [*names["base"], *names["novel"]]
    if unknown := [name for name in listed if name not in known]:
        raise ValueError(
            f"the file has no class {', '.join(unknown)}; it has {', '.join(list(known)[:12])}, ..."
        )
    if twice := [name for name, count in Counter(listed).items() if count > 1]:
        raise ValueError(f"split: {', '.join(twice)} is listed twice; a class is base or novel")
    for part, some in names.items():
        if not some:
            raise ValueError(f"split: there is no {part} class; name one or more")
    return [known[name] for name in names["base"]], [known[name] for name in names["novel"]]


@dataclass(frozen=True)
class CocoBoxes:
    """Where boxes are, and which classes count.

    Attributes:
        annotations: COCO's instances file, or one of its layout.
        images: Folder of the images.
        split: "ov_coco", "shapes", or names: {base: [...], novel: [...]}.
    """

    annotations: str
    images: str
    split: Split
    limit: int | None = None
    limit_seed: int = 0
    make: Callable[[], object] | None = None

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        split = self.split if isinstance(self.split, str) else "own"
        return {"split": split, **subset_protocol(self.limit, self.limit_seed)}

    def prepare(self) -> None:
        """Make what can be made; cheap when it is there."""
        prepare_files(self.annotations, (self.images,), self.make)

    def classes(self) -> tuple[list[str], list[str]]:
        """Names of all classes, base ones first, and of the base classes."""
        categories, _ = _read(self.annotations, Path(self.annotations).stat().st_mtime_ns)
        base, novel = split_categories(categories, self.split)
        return [each.name for each in [*base, *novel]], [each.name for each in base]

    def __call__(self, *, novel: bool = True) -> BoxImages:
        """Images with at least one box that counts.

        Args:
            novel: Whether boxes of novel classes count; in training they do not.

        Raises:
            ValueError: The file has no box that counts, or the split does not fit it.
        """
        self.prepare()
        categories, listed = _read(self.annotations, Path(self.annotations).stat().st_mtime_ns)
        base, held_out = split_categories(categories, self.split)
        classes = [*base, *held_out]
        wanted = {each.id: row for row, each in enumerate(classes if novel else base)}
        labels = {row: wanted.get(each.id) for row, each in enumerate(categories)}
        skipped: Counter[str] = Counter()
        chosen = [
            (image, _choose(image, labels, skipped))
            for image in subset(listed, self.limit, self.limit_seed)
        ]
        kept = [(image, regions) for image, regions in chosen if regions]
        skipped["image without boxes"] = len(chosen) - len(kept)
        if not kept:
            raise ValueError(f"{self.annotations} has no box that counts; skipped: {dict(skipped)}")
        require_images(Path(self.images), [(image.id, image.file_name) for image, _ in kept])
        return BoxImages(
            source=replace(self, make=None),  # which may not cross to workers
            classes=classes,
            base=len(base),
            chosen=kept,
            skipped=dict(+skipped),
        )


@cache
def _read(annotations: str, changed: int) -> tuple[list[Category], list[CocoImage]]:
    """The file; COCO's takes seconds, so it is read once."""
    del changed
    return read_regions(Path(annotations))


def _choose(
    image: CocoImage, labels: Mapping[int, int | None], skipped: Counter[str]
) -> list[Region]:
    """Regions of wanted classes with a box in the image, with labels in the order of the classes.

    Boxes are cut at the edges of the image.
    """
    kept = []
    for region in image.regions:
        label = labels[region.label]
        if label is None:
            continue
        x, y, width, height = region.box
        left, top = max(0.0, x), max(0.0, y)
        right, bottom = min(float(image.width), x + width), min(float(image.height), y + height)
        if width <= 0 or height <= 0:
            skipped["box without area"] += 1
        elif right <= left or bottom <= top:
            skipped["box outside the image"] += 1
        else:
            box = (left, top, right - left, bottom - top)
            kept.append(replace(region, label=label, box=box, outline=None))
    return kept


@dataclass(frozen=True)
class BoxImages:
    """Images and their boxes.

    Attributes:
        source: Where they come from.
        classes: Base classes, then novel ones; a label is a place in it.
        base: Number of base classes.
        chosen: Images with the boxes that count.
        skipped: Left out, by cause.
    """

    source: CocoBoxes
    classes: Sequence[Category]
    base: int
    chosen: Sequence[tuple[CocoImage, Sequence[Region]]]
    skipped: Mapping[str, int]

    @property
    def counts(self) -> dict[str, Any]:
        """Images and boxes of base and novel classes, and what was left out."""
        labels = [region.label for _, regions in self.chosen for region in regions]
        base = sum(label < self.base for label in labels)
        return {
            "images": len(self.chosen),
            "base_boxes": base,
            "novel_boxes": len(labels) - base,
            "skipped": dict(self.skipped),
        }

    @property
    def files(self) -> list[Path]:
        """Annotation files, which a fingerprint reads."""
        return [Path(self.source.annotations)]

    @property
    def listed(self) -> list[Path]:
        """Images, which a fingerprint lists."""
        return [Path(self.source.images) / image.file_name for image, _ in self.chosen]

    def placed(self, number: int, placing: Placing, random: np.random.Generator | None) -> Placed:
        """Image `number` with its boxes in a square.

        Args:
            number: In `chosen`.
            placing: How images are brought there.
            random: Of an augmented image; None for a plain one.
        """
        annotated, regions = self.chosen[number]
        image = annotated.read(self.source.images)
        some = regions if random is None else [region for region in regions if not region.crowd]
        boxes = torch.tensor([region.box for region in some]).view(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        labels = torch.tensor([region.label for region in some], dtype=torch.long)
        return placing(image, boxes, labels, annotated.file_name, random)

    def batches(self, placing: Placing, batch_size: int, workers: int) -> DataLoader[Any]:
        """All images once, in order, not augmented."""
        items = _Drawn(self, placing, [(row, row) for row in range(len(self.chosen))])
        return evaluation_loader(items, join_placed, batch_size=batch_size, workers=workers)


@dataclass(frozen=True)
class Placed:
    """One image in its square; fields as in `DetectionBatch`."""

    image: Float[Tensor, "3 S S"]
    size: tuple[int, int]
    scale: float
    boxes: Float[Tensor, "R 4"]
    labels: Tensor
    key: str


@dataclass(frozen=True)
class Placing:
    """Brings images into a square: resized, and padded right and below with the mean colour.

    With random numbers also large-scale jitter, a random crop and a flip. Names of classes do not
    say left or right, so a flip is harmless here.

    Attributes:
        side: Of the square in pixels; the longer side of an image fits it.
        mean: Pixel statistics of the model.
        std: Pixel statistics of the model.
        resize: Least and largest factor of the jitter.
        flip: Probability of a mirrored image.
    """

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0

    def __call__(
        self,
        image: Image.Image,
        boxes: Float[Tensor, "R 4"],
        labels: Tensor,
        key: str,
        random: np.random.Generator | None = None,
    ) -> Placed:
        """Image and boxes (xyxy in pixels) in the square, without boxes that a crop removed."""
        factor = 1.0 if random is None else float(random.uniform(*self.resize))
        scale = self.side * factor / max(image.height, image.width)
        width, height = (max(1, round(x * scale)) for x in (image.width, image.height))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        boxes = boxes * scale
        if random is not None:
            left, top = (int(random.integers(max(0, x - self.side) + 1)) for x in (width, height))
            width, height = min(width, self.side), min(height, self.side)
            image = image.crop((left, top, left + width, top + height))
            boxes = boxes - boxes.new_tensor([left, top, left, top])
            if random.uniform() < self.flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                boxes = torch.stack(
                    [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1
                )
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
        whole = (boxes[:, 2:] - boxes[:, :2] >= SMALLEST).all(1)
        planes = F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True)
        square = torch.zeros(3, self.side, self.side)
        square[:, :height, :width] = F.normalize(planes, list(self.mean), list(self.std))
        return Placed(square, (height, width), scale, boxes[whole], labels[whole], key)


def join_placed(samples: Sequence[Placed]) -> DetectionBatch:
    """Images of one batch with their boxes flat."""
    counts = torch.tensor([len(sample.labels) for sample in samples])
    return DetectionBatch(
        images=torch.stack([sample.image for sample in samples]),
        sizes=torch.tensor([sample.size for sample in samples]),
        scale=torch.tensor([sample.scale for sample in samples]),
        boxes=torch.cat([sample.boxes for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        owner=torch.arange(len(samples)).repeat_interleave(counts),
        keys=tuple(sample.key for sample in samples),
    )


@dataclass(frozen=True, kw_only=True)
class DetectionTrainData:
    """Images with boxes of base classes, and how they become batches.

    The order is a function of seed and epoch, the augmentation of seed, epoch and place, whatever
    the number of workers: a resumed run goes on with the very same batches.

    Attributes:
        boxes: Where they are.
        side: Of the detector's square.
        mean: Pixel statistics of the model.
        std: Pixel statistics of the model.
        batch_size: Images per process and batch.
        workers: Loader processes per process; 0 reads in the process itself.
        resize: Least and largest factor of the jitter.
        flip: Probability of a mirrored image.
    """

    boxes: CocoBoxes
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batch_size: int = 8
    workers: int = 2
    resize: Sequence[float] = (0.1, 2.0)
    flip: float = 0.5

    resampled = False

    def prepare(self) -> dict[str, Any]:
        """Make or check the data, before workers start.

        Returns:
            For the run's record: names of base and novel classes, counts, fingerprint.
        """
        low, high = self.resize
        if not 0 < low <= high or not 0 <= self.flip <= 1 or self.batch_size < 1:
            raise ValueError(
                f"resize is {list(self.resize)}, flip {self.flip}, batch_size {self.batch_size}; "
                "give factors above 0 in rising order, a probability, and 1 image or more"
            )
        found = self.boxes(novel=False)
        names, base = self.classes()
        return {
            "base": base,
            "novel": names[len(base) :],
            "counts": found.counts,
            "fingerprint": hash_file(Path(self.boxes.annotations)),
        }

    def classes(self) -> tuple[list[str], list[str]]:
        """Names of all classes, and of the base classes."""
        return self.boxes.classes()

    def loader(
        self, *, seed: int, epoch: int, rank: int, world_size: int, start: int = 0
    ) -> DetectionEpoch:
        """Batches of one process from batch `start` of the epoch on.

        Raises:
            ValueError: There are fewer images than one batch of every process.
        """
        images = self.boxes(novel=False)
        batches = len(images.chosen) // (self.batch_size * world_size)
        if batches < 1:
            raise ValueError(
                f"{len(images.chosen)} images are less than one batch of {self.batch_size} for "
                f"each of {world_size} processes; lower data.batch_size"
            )
        return DetectionEpoch(self, images, (seed, epoch), rank, world_size, batches, start)


@dataclass(frozen=True)
class DetectionEpoch:
    """One epoch of one process; `len()` is the number of batches of the whole epoch."""

    data: DetectionTrainData
    images: BoxImages
    draw: tuple[int, int]
    rank: int
    world_size: int
    batches: int
    start: int

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[DetectionBatch]:
        data = self.data
        placing = Placing(
            data.side, data.mean, data.std, (data.resize[0], data.resize[1]), data.flip
        )
        items = _Drawn(self.images, placing, self._places(), self.draw)
        loader = evaluation_loader(
            items, join_placed, batch_size=data.batch_size, workers=data.workers
        )
        return iter(loader)

    def _places(self) -> list[tuple[int, int]]:
        """Place in the epoch's order, and number of the image there."""
        order = np.random.default_rng((*self.draw, 0)).permutation(len(self.images.chosen))
        size = self.data.batch_size
        firsts = [
            (number * self.world_size + self.rank) * size
            for number in range(self.start, self.batches)
        ]
        return [(place, int(order[place])) for at in firsts for place in range(at, at + size)]


@dataclass(frozen=True)
class _Drawn(Dataset[Any]):
    """Images by place and number, augmented where there is a draw."""

    images: BoxImages
    placing: Placing
    places: Sequence[tuple[int, int]]
    draw: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Placed:
        place, image = self.places[number]
        random = self.draw and np.random.default_rng((*self.draw, 1, place))
        return self.images.placed(image, self.placing, random)


def unpack_shapes(folder: str | Path, *, scenes: int, train: int, val: int, seed: int) -> None:
    """Training scenes of the shapes world as COCO files: images_train and instances_train.json.

    Args:
        folder: Of the shapes world, which is made if it is not there.
        scenes: How many of the training scenes.
        train: Of `make_shapes`.
        val: Of `make_shapes`.
        seed: Of `make_shapes`.
    """
    if scenes > train:
        raise ValueError(f"{scenes} scenes of {train} training scenes; lower scenes or raise train")
    make_shapes(folder, train=train, val=val, seed=seed)
    root, names = Path(folder), thing_names()
    (root / "images_train").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for shard in sorted((root / "train").glob("*.tar")):
        with tarfile.open(shard) as archive:
            parts = {entry.name: archive.extractfile(entry) for entry in archive}
            for name, file in parts.items():
                if not name.endswith(".json") or file is None or len(images) == scenes:
                    continue
                record = json.loads(file.read())
                picture = parts[f"{record['key']}.jpg"]
                assert picture is not None
                path = root / "images_train" / f"{record['key']}.jpg"
                path.write_bytes(picture.read())
                with Image.open(path) as image:
                    width, height = image.size
                number = len(images) + 1
                images.append(
                    {"id": number, "file_name": path.name, "height": height, "width": width}
                )
                for one in record["objects"]:
                    boxes.append(
                        {
                            "id": len(boxes) + 1,
                            "image_id": number,
                            "category_id": names.index(f"{one['colour']} {one['shape']}") + 1,
                            "bbox": one["box"],
                        }
                    )
    categories = [{"id": row, "name": name} for row, name in enumerate(names, start=1)]
    written = {"images": images, "annotations": boxes, "categories": categories}
    write_atomically(root / "annotations" / "instances_train.json", json.dumps(written))
