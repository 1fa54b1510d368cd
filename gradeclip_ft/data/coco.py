"""COCO's files: instances, panoptic segments and captions.

Category ids are sparse, so a label is the rank of its id among the sorted ids. Panoptic segment
ids are stored in the colours of a PNG.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as run_lengths

from gradeclip_ft.data.files import load_json
from gradeclip_ft.images import read_image

LAYOUT = "expected the layout of cocodataset.org's files"
ID = (int, str)


@dataclass(frozen=True)
class Category:
    """One class; things are countable, stuff is not."""

    id: int
    name: str
    is_thing: bool


@dataclass(frozen=True)
class Region:
    """One annotated region.

    Attributes:
        id: Of the annotation; for panoptic files the segment's id, which is also its colour.
        label: Rank of the category among the sorted category ids.
        box: (x, y, width, height) in pixels of the original image.
        crowd: A group that is annotated as one (COCO `iscrowd`).
        outline: Polygons or run lengths; None for panoptic segments, and where there is only a box.
    """

    id: int
    label: int
    box: tuple[float, float, float, float]
    crowd: bool
    outline: Any = None


@dataclass(frozen=True)
class CocoImage:
    """One image with its regions in file order, and its panoptic PNG (None in instance files)."""

    id: int
    file_name: str
    height: int
    width: int
    regions: tuple[Region, ...]
    segments: str | None = None

    def read(self, folder: str) -> Image.Image:
        """Its pixels as stored, which boxes and masks are about.

        Raises:
            ValueError: They are not as many as the annotation file says.
        """
        path = Path(folder) / self.file_name
        image = read_image(path, exif=False)
        if (image.height, image.width) != (self.height, self.width):
            raise ValueError(
                f"{path} (id {self.id}) has {image.height} x {image.width} pixels (height x "
                f"width), the annotation file says {self.height} x {self.width}"
            )
        return image


@dataclass(frozen=True)
class CaptionedImage:
    """One image with its captions in file order."""

    id: int
    file_name: str
    captions: tuple[str, ...]


def read_regions(path: Path) -> tuple[list[Category], list[CocoImage]]:
    """Categories in order of their ids, and all images of an instances or a panoptic file."""
    content = load_json(path)
    images = _by_id(path, content, "images")
    listed = _by_id(path, content, "categories")
    categories = [
        Category(key, _field(path, listed[key], "name", str), bool(listed[key].get("isthing", 1)))
        for key in sorted(listed, key=int)
    ]
    labels = {category.id: row for row, category in enumerate(categories)}
    regions: dict[int, list[Region]] = {key: [] for key in images}
    segments: dict[int, str] = {}
    for entry in _annotations(path, content, images):
        image = entry["image_id"]
        if "segments_info" not in entry:
            regions[image].append(_region(path, entry, labels))
            continue
        if image in segments:
            raise ValueError(f"{path}: image {image} has two panoptic annotations, expected one")
        segments[image] = _field(path, entry, "file_name", str)
        regions[image] += [
            _region(path, segment, labels) for segment in _entries(path, entry, "segments_info")
        ]
    return categories, [
        CocoImage(
            key,
            _image_name(path, image),
            _field(path, image, "height", int),
            _field(path, image, "width", int),
            tuple(regions[key]),
            segments.get(key),
        )
        for key, image in images.items()
    ]


def read_captions(path: Path, skipped: Counter[str] | None = None) -> list[CaptionedImage]:
    """All images of a captions file; an image may have any number of captions, also none.

    Args:
        path: The file.
        skipped: Gets the number of captions that are not text.
    """
    content = load_json(path)
    images = _by_id(path, content, "images")
    captions: dict[int, list[Any]] = {key: [] for key in images}
    for entry in _annotations(path, content, images):
        captions[entry["image_id"]].append(_field(path, entry, "caption"))
    return [
        CaptionedImage(key, _field(path, image, "file_name", str), texts_of(captions[key], skipped))
        for key, image in images.items()
    ]


def read_image_ids(path: Path) -> set[int]:
    """Ids of the images of any of COCO's files."""
    return set(_by_id(path, load_json(path), "images"))


def texts_of(captions: Iterable[Any], skipped: Counter[str] | None = None) -> tuple[str, ...]:
    """Captions without surrounding blanks; nulls and numbers are left out and counted.

    >>> texts_of([" a dog ", None, float("nan"), 7])
    ('a dog',)
    """
    listed = list(captions)
    texts = tuple(caption.strip() for caption in listed if isinstance(caption, str))
    if skipped is not None and len(texts) < len(listed):
        skipped["caption that is not text"] += len(listed) - len(texts)
    return texts


def region_masks(
    image: CocoImage, regions: Sequence[Region], folder: Path | None
) -> UInt8[ndarray, "R H W"]:
    """Masks of some regions of an image, 1 inside, at the original size.

    Args:
        image: The image they belong to.
        regions: Some of its regions; each with an outline, in instance files.
        folder: Where the panoptic PNGs are; not needed for instance files.
    """
    if not regions:
        return np.zeros((0, image.height, image.width), np.uint8)
    if image.segments is None:
        return np.stack([_outline_mask(image, region) for region in regions])
    if folder is None:
        raise ValueError(
            f"image {image.id}: panoptic masks are PNGs; name their folder as segments="
        )
    path = folder / image.segments
    ids = read_segment_ids(path)
    _check_size(image, ids.shape, str(path))
    masks = np.stack([ids == region.id for region in regions]).astype(np.uint8)
    for region, mask in zip(regions, masks, strict=True):
        if not mask.any():
            raise ValueError(
                f"{path}: segment {region.id} of image {image.id} has no pixel; "
                "annotation file and PNG do not belong together"
            )
    return masks


def read_segment_ids(path: Path) -> Int[ndarray, "H W"]:
    """Segment ids of a panoptic PNG: R + 256 G + 65536 B."""
    stored = np.asarray(read_image(path, exif=False))
    colours = stored.astype(np.int32)  # before the sum: 8 bits overflow
    ids: Int[ndarray, "H W"] = colours[..., 0] + (colours[..., 1] << 8) + (colours[..., 2] << 16)
    return ids


def _outline_mask(image: CocoImage, region: Region) -> UInt8[ndarray, "H W"]:
    where = f"outline of region {region.id}, image {image.id}"
    outline, size = region.outline, (image.height, image.width)
    if isinstance(outline, Mapping):
        _check_size(image, tuple(outline.get("size") or (0, 0)), where)
    else:  # polygons of two points and fewer have no area, and pycocotools refuses them
        outline = [polygon for polygon in outline if len(polygon) >= 6]
        if not outline:
            return np.zeros(size, np.uint8)
    try:
        if isinstance(outline, list) or isinstance(outline["counts"], list):
            outline = run_lengths.frPyObjects(outline, *size)
        packed = run_lengths.merge(outline) if isinstance(outline, list) else outline
        mask: UInt8[ndarray, "H W"] = np.asarray(run_lengths.decode(packed), np.uint8)
    except Exception as error:  # pycocotools raises whatever its C code trips over
        raise ValueError(
            f"{where}: neither polygons nor run lengths ({type(error).__name__}: {error}); {LAYOUT}"
        ) from error
    return mask


def _check_size(image: CocoImage, found: tuple[int, ...], where: str) -> None:
    if found != (image.height, image.width):
        raise ValueError(
            f"{where} has {' x '.join(map(str, found))} pixels (height x width), the annotation "
            f"file says {image.height} x {image.width} for image {image.id}"
        )


def _region(path: Path, entry: Mapping[str, Any], labels: Mapping[int, int]) -> Region:
    identity, category = _field(path, entry, "id", ID), _field(path, entry, "category_id", ID)
    box = _field(path, entry, "bbox")
    outline = entry.get("segmentation") or None
    if category not in labels:
        raise ValueError(f"{path}: region {identity} has category {category}, which is not listed")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        raise ValueError(f"{path}: box of region {identity} is {box}, expected x, y, width, height")
    if isinstance(outline, list) and not all(isinstance(polygon, list) for polygon in outline):
        raise ValueError(
            f"{path}: the segmentation of region {identity} is a flat list, expected a list of "
            "polygons, [[x, y, x, y, ...], ...]"
        )
    x, y, width, height = map(float, box)
    crowd = bool(entry.get("iscrowd", 0))
    return Region(identity, labels[category], (x, y, width, height), crowd, outline)


def _image_name(path: Path, image: Mapping[str, Any]) -> str:
    """The file of an image; LVIS gives an address instead, whose end is val2017/NAME.jpg."""
    if "file_name" not in image and "coco_url" in image:
        return "/".join(_field(path, image, "coco_url", str).rsplit("/", 2)[1:])
    return str(_field(path, image, "file_name", str))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _by_id(path: Path, content: Any, key: str) -> dict[int, Mapping[str, Any]]:
    """Entries of a list by their ids, which must differ.

    Two images of one id would share their annotations, and every number would be wrong.
    """
    entries = _entries(path, content, key)
    found = {_field(path, entry, "id", ID): entry for entry in entries}
    if len(found) < len(entries):
        ids = Counter(entry["id"] for entry in entries)
        (twice, _), *_ = ids.most_common(1)
        raise ValueError(
            f"{path}: {len(entries) - len(found)} entries of {key} have an id that another one "
            f"has, first {twice}; every id must be unique"
        )
    return found


def _annotations(path: Path, content: Any, images: Mapping[int, object]) -> list[Mapping[str, Any]]:
    entries = _entries(path, content, "annotations")
    keys = [_field(path, entry, "image_id", ID) for entry in entries]
    unknown = [key for key in keys if key not in images]
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} annotations are of images that are not listed, first image_id "
            f"{unknown[0]!r} (images have ids such as {next(iter(images), None)!r}); annotations "
            "and images must come from the same file"
        )
    return entries


def _entries(path: Path, content: Any, key: str) -> list[Mapping[str, Any]]:
    if not isinstance(content, Mapping) or key not in content:
        raise ValueError(f"{path} has no {key}; {LAYOUT}")
    found = content[key]
    if not isinstance(found, list) or not all(isinstance(entry, Mapping) for entry in found):
        raise ValueError(f"{path}: {key} is not a list of objects; {LAYOUT}")
    return found


def _field(
    path: Path, entry: Mapping[str, Any], key: str, kind: type | tuple[type, ...] = object
) -> Any:
    if key in entry and isinstance(entry[key], kind):
        return entry[key]
    what = entry.get("id", entry.get("image_id", "unknown"))
    has = f"{key} {entry[key]!r}" if key in entry else f"no {key}"
    raise ValueError(f"{path}: entry {what} has {has}; {LAYOUT}")


SEGMENTS_PER_IMAGE = 1000


@dataclass(frozen=True)
class DrawnScene:
    """One annotated image.

    Attributes:
        owner: (height, width) array of segment numbers, 0, 1, 2, ...; each pixel has one.
        classes: Index of each segment's class in things + stuff.
    """

    id: int
    file_name: str
    captions: tuple[str, ...]
    owner: NDArray[np.uint8]
    classes: tuple[int, ...]


def write_coco(
    folder: Path,
    split: str,
    pictures: Iterable[DrawnScene],
    *,
    things: Sequence[str],
    stuff: Sequence[str],
) -> None:
    """Writes {captions,instances,panoptic}_SPLIT.json and panoptic_SPLIT/*.png.

    Category ids are 1 for the first thing and run on through stuff. Instances hold the things
    alone.
    """
    masks = folder / f"panoptic_{split}"
    masks.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    sentences: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    for picture in pictures:
        height, width = picture.owner.shape
        images.append(
            {"id": picture.id, "file_name": picture.file_name, "height": height, "width": width}
        )
        for caption in picture.captions:
            sentences.append({"id": len(sentences) + 1, "image_id": picture.id, "caption": caption})
        segments = [_segment(picture, number) for number in range(len(picture.classes))]
        for number, segment in enumerate(segments):
            if segment["category_id"] <= len(things):
                mask = np.asfortranarray(picture.owner == number, dtype=np.uint8)
                packed = run_lengths.encode(mask)
                outline = {"size": list(packed["size"]), "counts": packed["counts"].decode()}
                place = {"id": len(instances) + 1, "image_id": picture.id, "segmentation": outline}
                instances.append({**segment, **place})
        ids = picture.owner.astype(np.uint32) + _segment_id(picture, 0)
        colours = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], -1).astype(np.uint8)
        name = f"{Path(picture.file_name).stem}.png"
        Image.fromarray(colours, "RGB").save(masks / name)
        panoptic.append({"image_id": picture.id, "file_name": name, "segments_info": segments})
    names = [*things, *stuff]
    categories = [
        {
            "id": number,
            "name": name,
            "supercategory": name.split()[-1],
            "isthing": int(number <= len(things)),
        }
        for number, name in enumerate(names, start=1)
    ]
    plain = [{key: entry[key] for key in ("id", "name", "supercategory")} for entry in categories]
    files: dict[str, dict[str, Any]] = {
        "captions": {"annotations": sentences},
        "instances": {"annotations": instances, "categories": plain[: len(things)]},
        "panoptic": {"annotations": panoptic, "categories": categories},
    }
    for kind, content in files.items():
        text = json.dumps({"info": {"description": f"{kind} {split}"}, "images": images, **content})
        (folder / f"{kind}_{split}.json").write_text(text)


def _segment(picture: DrawnScene, number: int) -> dict[str, Any]:
    rows, columns = np.nonzero(picture.owner == number)
    if not len(rows):
        raise ValueError(
            f"segment {number} of {picture.file_name} has no pixel; leave it out of `classes` "
            "and renumber `owner`"
        )
    left, top = int(columns.min()), int(rows.min())
    return {
        "id": _segment_id(picture, number),
        "category_id": picture.classes[number] + 1,
        "area": len(rows),
        "bbox": [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1],
        "iscrowd": 0,
    }


def _segment_id(picture: DrawnScene, number: int) -> int:
    """Unique over all images up to 16,776; 0 stays free, as in COCO."""
    return picture.id * SEGMENTS_PER_IMAGE + number + 1
