"""COCO annotation files: captions, instances and panoptic, in the layout of the published ones.

Instance masks are compressed run lengths, panoptic masks are PNGs whose colour is the segment's
id, R + 256 G + 65536 B.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as run_lengths

SEGMENTS_PER_IMAGE = 1000


@dataclass(frozen=True)
class Picture:
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
    pictures: Iterable[Picture],
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


def _segment(picture: Picture, number: int) -> dict[str, Any]:
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
    picture: Picture, number: int, segment: dict[str, Any], annotation: int
) -> dict[str, Any]:
    encoded = run_lengths.encode(np.asfortranarray(picture.owner == number, dtype=np.uint8))
    lengths = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
    return {**segment, "id": annotation, "image_id": picture.id, "segmentation": lengths}


def _write_ids(path: Path, picture: Picture) -> None:
    ids = picture.owner.astype(np.uint32) + _segment_id(picture, 0)
    channels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], -1).astype(np.uint8)
    Image.fromarray(channels, "RGB").save(path)


def _segment_id(picture: Picture, number: int) -> int:
    """Unique over all images up to 16,776; 0 stays free, as in COCO."""
    return picture.id * SEGMENTS_PER_IMAGE + number + 1
