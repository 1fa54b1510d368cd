"""COCO's files: instances, panoptic segments and captions.

Category ids are sparse, so a label is the rank of its id among the sorted ids. Panoptic segment
ids are stored in the colours of a PNG.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from pycocotools import mask as run_lengths

from gradeclip_ft.data.files import read_json
from gradeclip_ft.images import read_image

LAYOUT = "expected the layout of cocodataset.org's files"


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
        outline: Polygons or run lengths; None for panoptic segments.
    """

    id: int
    label: int
    box: tuple[float, float, float, float]
    crowd: bool
    outline: Any = None


@dataclass(frozen=True)
class CocoImage:
    """One image with its regions in file order.

    Attributes:
        id: Of the image.
        file_name: Relative to the image folder.
        height: In pixels.
        width: In pixels.
        regions: In file order.
        segments: Name of the panoptic PNG; None for instance files.
    """

    id: int
    file_name: str
    height: int
    width: int
    regions: tuple[Region, ...]
    segments: str | None = None


@dataclass(frozen=True)
class CaptionedPicture:
    """One image with its captions in file order."""

    id: int
    file_name: str
    captions: tuple[str, ...]


def read_regions(path: Path) -> tuple[list[Category], list[CocoImage]]:
    """Categories in order of their ids, and all images of an instances or a panoptic file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is cut off, is of another kind, or its ids do not match.
    """
    content = read_json(path, ("images", "annotations", "categories"))
    categories = [
        Category(entry["id"], entry["name"], bool(entry.get("isthing", 1)))
        for entry in sorted(content["categories"], key=lambda entry: int(entry["id"]))
    ]
    labels = {category.id: row for row, category in enumerate(categories)}
    if len(labels) != len(categories):
        raise ValueError(f"{path}: two categories have the same id; every id must be unique")
    by_image: dict[int, list[Region]] = {}
    segments: dict[int, str] = {}
    for entry in content["annotations"]:
        found = by_image.setdefault(_key(path, entry, "image_id"), [])
        if "segments_info" in entry:
            segments[entry["image_id"]] = _key(path, entry, "file_name")
            found += [_region(path, segment, labels) for segment in entry["segments_info"]]
        else:
            found.append(_region(path, entry, labels))
    images = _images(path, content["images"], by_image)
    return categories, [
        CocoImage(
            image["id"],
            image["file_name"],
            _key(path, image, "height"),
            _key(path, image, "width"),
            tuple(by_image.get(image["id"], ())),
            segments.get(image["id"]),
        )
        for image in images
    ]


def read_captions(path: Path) -> list[CaptionedPicture]:
    """All images of a captions file; an image may have any number of captions, also none.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is cut off, is of another kind, or its ids do not match.
    """
    content = read_json(path, ("images", "annotations"))
    by_image: dict[int, list[str]] = {}
    for entry in content["annotations"]:
        caption = _key(path, entry, "caption").strip()
        by_image.setdefault(_key(path, entry, "image_id"), []).append(caption)
    return [
        CaptionedPicture(image["id"], image["file_name"], tuple(by_image.get(image["id"], ())))
        for image in _images(path, content["images"], by_image)
    ]


def region_masks(
    picture: CocoImage, regions: Sequence[Region], folder: Path | None
) -> UInt8[ndarray, "R H W"]:
    """Masks of some regions of a picture, 1 inside, at the original size.

    Args:
        picture: The image they belong to.
        regions: Some of its regions.
        folder: Where the panoptic PNGs are; not needed for instance files.

    Raises:
        FileNotFoundError: No such PNG.
        ValueError: A PNG or an outline is of another size, or lacks a segment.
    """
    if not regions:
        return np.zeros((0, picture.height, picture.width), np.uint8)
    if picture.segments is None:
        return np.stack([_outline_mask(picture, region) for region in regions])
    if folder is None:
        raise ValueError(
            f"image {picture.id}: panoptic masks are PNGs; name their folder as segments="
        )
    path = folder / picture.segments
    ids = read_segment_ids(path)
    _check_size(picture, ids.shape, str(path))
    masks = np.stack([ids == region.id for region in regions]).astype(np.uint8)
    for region, mask in zip(regions, masks, strict=True):
        if not mask.any():
            raise ValueError(
                f"{path}: segment {region.id} of image {picture.id} has no pixel; "
                "annotation file and PNG do not belong together"
            )
    return masks


def read_segment_ids(path: Path) -> Int[ndarray, "H W"]:
    """Segment ids of a panoptic PNG: R + 256 G + 65536 B.

    Raises:
        FileNotFoundError: No such PNG.
        ValueError: The PNG cannot be read.
    """
    stored = np.asarray(read_image(path, exif=False))
    colours = stored.astype(np.int32)  # before the sum: 8 bits overflow
    ids: Int[ndarray, "H W"] = colours[..., 0] + (colours[..., 1] << 8) + (colours[..., 2] << 16)
    return ids


def _outline_mask(picture: CocoImage, region: Region) -> UInt8[ndarray, "H W"]:
    where = f"outline of region {region.id}, image {picture.id}"
    outline = region.outline
    if outline is None:
        raise ValueError(f"{where}: no segmentation; use boxes only, or a file with masks")
    size = (picture.height, picture.width)
    if isinstance(outline, Mapping):
        _check_size(picture, tuple(outline["size"]), where)
        packed = rle.frPyObjects(outline, *size) if isinstance(outline["counts"], list) else outline
    else:
        polygons = [polygon for polygon in outline if len(polygon) >= 6]
        if not polygons:
            return np.zeros(size, np.uint8)
        packed = rle.merge(rle.frPyObjects(polygons, *size))
    mask: UInt8[ndarray, "H W"] = np.asarray(rle.decode(packed), np.uint8)
    return mask


def _check_size(picture: CocoImage, found: tuple[int, ...], where: str) -> None:
    if found != (picture.height, picture.width):
        raise ValueError(
            f"{where} has {found[0]} x {found[1]} pixels (height x width), the annotation file "
            f"says {picture.height} x {picture.width} for image {picture.id}"
        )


def _region(path: Path, entry: Mapping[str, Any], labels: Mapping[int, int]) -> Region:
    identity, category = _key(path, entry, "id"), _key(path, entry, "category_id")
    box = _key(path, entry, "bbox")
    if category not in labels:
        raise ValueError(f"{path}: region {identity} has category {category}, which is not listed")
    if len(box) != 4:
        raise ValueError(f"{path}: box of region {identity} is {box}, expected x, y, width, height")
    x, y, width, height = (float(value) for value in box)
    return Region(
        identity,
        labels[category],
        (x, y, width, height),
        bool(entry.get("iscrowd", 0)),
        entry.get("segmentation"),
    )


def _images(
    path: Path, images: Sequence[Mapping[str, Any]], by_image: Mapping[int, object]
) -> Sequence[Mapping[str, Any]]:
    known = {_key(path, image, "id") for image in images}
    unknown = sorted(set(by_image) - known)
    if unknown:
        raise ValueError(
            f"{path}: annotations of {len(unknown)} images that are not listed, first id "
            f"{unknown[0]}; annotations and images must come from the same file"
        )
    for image in images:
        _key(path, image, "file_name")
    return images


def _key(path: Path, entry: Mapping[str, Any], key: str) -> Any:
    if key not in entry:
        what = entry.get("id", entry.get("image_id", "unknown"))
        raise ValueError(f"{path}: entry {what} has no {key}; {LAYOUT}")
    return entry[key]


SEGMENTS_PER_IMAGE = 1000


@dataclass(frozen=True)
class DrawnScene:
    """One annotated image.

    Attributes:
        id: Positive number of the image.
        file_name: Name of the image file.
        captions: All sentences about it.
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
                instances.append(_instance(picture, number, segment, len(instances) + 1))
        name = f"{Path(picture.file_name).stem}.png"
        _write_ids(masks / name, picture)
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


def _instance(
    picture: DrawnScene, number: int, segment: dict[str, Any], annotation: int
) -> dict[str, Any]:
    encoded = run_lengths.encode(np.asfortranarray(picture.owner == number, dtype=np.uint8))
    lengths = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
    return {**segment, "id": annotation, "image_id": picture.id, "segmentation": lengths}


def _write_ids(path: Path, picture: DrawnScene) -> None:
    ids = picture.owner.astype(np.uint32) + _segment_id(picture, 0)
    channels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], -1).astype(np.uint8)
    Image.fromarray(channels, "RGB").save(path)


def _segment_id(picture: DrawnScene, number: int) -> int:
    """Unique over all images up to 16,776; 0 stays free, as in COCO."""
    return picture.id * SEGMENTS_PER_IMAGE + number + 1
