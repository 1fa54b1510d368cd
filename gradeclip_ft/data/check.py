"""What an evaluation's data hold, without a model: for `data check`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

from gradeclip_ft.data.files import TarSample, index_shards, load_json
from gradeclip_ft.data.labelled import ClassFolders, ClassShards, LabelledImages
from gradeclip_ft.data.pairs import CaptionChoices, CaptionedImages, CaptionFile, CaptionShards
from gradeclip_ft.data.regions import CocoRegions, RegionImages
from gradeclip_ft.data.samples import image_of, read_caption, read_record, sample_name
from gradeclip_ft.data.shards import (
    BadSampleError,
    RawSample,
    Skips,
    expand_shards,
    is_local,
    local_path,
    read_shard,
)

Source = CocoRegions | CaptionFile | CaptionShards | ClassFolders | ClassShards | CaptionChoices
Opened = RegionImages | CaptionedImages | LabelledImages
TRAINING_PARTS = ("train", "restval")


def _silent(items: range, what: str, total: int) -> Iterable[int]:
    del what, total
    return items


@dataclass(frozen=True)
class Findings:
    """Facts about the data of one evaluation.

    Attributes:
        counts: As a result's fingerprint has them.
        classes: Class names; empty where there are none.
        absent: Classes without a sample.
        captions: Number of images by their number of captions.
        images: Names of the images.
        unreadable: Messages of images that could not be read; empty if none was tried.
    """

    counts: Mapping[str, Any]
    classes: Sequence[str]
    absent: Sequence[str]
    captions: Mapping[int, int]
    images: Sequence[str]
    unreadable: Sequence[str]


def inspect(
    source: Source, *, read: bool, track: Callable[[range, str, int], Iterable[int]] = _silent
) -> Findings:
    """Open the data as an evaluator does, and look.

    Args:
        source: As an evaluator holds it.
        read: Also decode every image and mask, and compare sizes.
        track: Shows how far the reading is: numbers, what, and how many.

    Raises:
        FileNotFoundError: Files are missing.
        ValueError: Files are damaged or do not fit each other.
    """
    opened = _open(source)
    classes = [] if isinstance(opened, CaptionedImages) else list(opened.names)
    present = _labels(opened)
    return Findings(
        counts=opened.counts,
        classes=classes,
        absent=[name for label, name in enumerate(classes) if label not in present],
        captions=Counter(map(len, opened.captions)) if isinstance(opened, CaptionedImages) else {},
        images=_image_names(opened),
        unreadable=list(_unreadable(opened, track)) if read else [],
    )


def training_images(where: str) -> set[str]:
    """Keys of the images of a training set: a COCO or Karpathy JSON, or shards.

    Raises:
        FileNotFoundError: No such file or shard.
        ValueError: A file is damaged or of another kind, or shards are not on this machine.
    """
    if where.endswith(".json"):
        content = load_json(Path(where))
        images = content.get("images") if isinstance(content, Mapping) else None
        if not isinstance(images, list):
            raise ValueError(f"{where} has no images; give a COCO or Karpathy file, or shards")
        names = [
            str(entry.get("file_name", entry.get("filename")))
            for entry in images
            if entry.get("split", "train") in TRAINING_PARTS
        ]
        return set(map(image_key, names))
    urls = expand_shards(where)
    if not all(map(is_local, urls)):
        raise ValueError(f"{where}: shards of training data must be on this machine to be compared")
    return {image_key(_origin(sample)) for sample in index_shards([local_path(u) for u in urls])}


def image_key(name: str) -> str:
    """What names the same photo in different releases of a data set.

    >>> image_key("val2014/COCO_val2014_000000000285.jpg"), image_key("000000000285.jpg")
    ('285', '285')
    """
    stem = re.sub(r"^COCO_\w+?_(?=\d+$)", "", Path(name).stem)
    return stem.lstrip("0") or "0" if stem.isdigit() else stem


def _open(source: Source) -> Opened:
    match source:
        case CocoRegions():
            return source(image_size=32, patch=32, mean=(0.0,) * 3, std=(1.0,) * 3)
        case CaptionChoices():
            return source(transform=_nothing, tokenizer=_no_tokens)[0]
        case CaptionFile() | CaptionShards():
            return source(transform=_nothing, tokenizer=_no_tokens)
    return source(transform=_nothing)


def _labels(opened: Opened) -> set[int]:
    if isinstance(opened, RegionImages):
        return {region.label for _, regions in opened.pictures for region in regions}
    return set(opened.labels) if isinstance(opened, LabelledImages) else set()


def _image_names(opened: Opened) -> list[str]:
    if isinstance(opened, RegionImages):
        return [picture.file_name for picture, _ in opened.pictures]
    if isinstance(opened, CaptionedImages):
        return list(opened.names)
    return [path.name for path in opened.listed]


def _unreadable(opened: Opened, track: Callable[[range, str, int], Iterable[int]]) -> Iterable[str]:
    for number in track(range(len(opened)), "reading images", len(opened)):
        try:
            opened[number]
        except (ValueError, FileNotFoundError) as error:
            yield str(error)


def _origin(sample: TarSample) -> str:
    """The name a training sample had before it came into a shard."""
    record = sample.record()
    for key in ("source", "file_name", "image_id", "url"):
        if record.get(key):
            return str(record[key]).rsplit("/", 1)[-1]
    return str(sample.key)


def _nothing(image: Image.Image) -> Tensor:
    del image
    return torch.zeros(3, 1, 1)


def _no_tokens(texts: Sequence[str], *, trim: bool = False) -> Tensor:
    del trim
    return torch.zeros(len(texts), 1, dtype=torch.long)


BORDER_SAMPLE = 100
WHITE = 250


@dataclass
class Report:
    """What is in some shards.

    Attributes:
        shards: Their number.
        samples: That could be grouped.
        usable: That training would use.
        causes: What is wrong, by cause.
        examples: The first of each cause, with its message.
        looked_at: Images checked for borders.
        bordered: Of these, images with white bars at two opposite sides.
    """

    shards: int = 0
    samples: int = 0
    usable: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    looked_at: int = 0
    bordered: int = 0

    def note(self, cause: str, where: str, message: str) -> None:
        """One more of a cause."""
        self.causes[cause] += 1
        self.examples.setdefault(cause, f"{where}: {message}")

    def join(self, other: Report) -> None:
        """Add the report of other shards."""
        self.shards += other.shards
        self.samples += other.samples
        self.usable += other.usable
        self.causes += other.causes
        self.examples = {**other.examples, **self.examples}
        self.looked_at += other.looked_at
        self.bordered += other.bordered


def verify_shard(url: str) -> Report:
    """Reads all samples of a shard, decodes their images, and notes what cannot be used."""
    report = Report(shards=1)
    for raw in read_shard(url, Skips(tell=report.note)):
        report.samples += 1
        dotted = [suffix for suffix in raw if "." in suffix]
        if dotted:
            name = f"{raw['__key__']}.{dotted[0]}"
            report.note("dotted_name", sample_name(raw), f"{name} is split at its first dot")
        try:
            image = _read(raw)
        except BadSampleError as error:
            report.note(str(error.args[0]), sample_name(raw), str(error.args[-1]))
            continue
        report.usable += 1
        if report.looked_at < BORDER_SAMPLE:
            report.looked_at += 1
            report.bordered += has_white_bars(np.asarray(image))
    return report


def has_white_bars(image: UInt8[ndarray, "H W 3"]) -> bool:
    """White bars at both ends of one axis, each at least 2 % of it: padding to a square.

    img2dataset pads so by default. Maps of regions suffer from it; download with keep_ratio.
    """
    white: Bool[ndarray, "H W"] = np.asarray((image >= WHITE).all(axis=2))
    if white.all():
        return False
    return _bars(np.asarray(white.all(axis=1))) or _bars(np.asarray(white.all(axis=0)))


def _bars(lines: Bool[ndarray, " n"]) -> bool:
    """Whether the row of lines begins and ends with white ones."""
    first, last = int(np.argmin(lines)), int(np.argmin(lines[::-1]))
    return min(first, last) >= max(1.0, 0.02 * len(lines))


def _read(raw: RawSample) -> Image.Image:
    read_caption(raw, read_record(raw), "text", key=0)
    return image_of(raw)
