"""What data hold, without a model: for `data check` and `data verify`."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray

from gradeclip_ft.data.files import ImageSet, Source, TarSample, index_shards, load_json
from gradeclip_ft.data.regions import RegionImages
from gradeclip_ft.data.samples import image_of, read_caption, read_record, sample_name
from gradeclip_ft.data.shards import (
    BadSampleError,
    Skips,
    expand_shards,
    is_local,
    local_path,
    read_shard,
)
from gradeclip_ft.images import peculiarity

TRAINING_PARTS = ("train", "restval")
ORIGINS = ("source", "file_name", "image_id", "url")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Findings:
    """Facts about the data of one evaluation.

    Attributes:
        counts: As a result's fingerprint has them.
        absent: Classes without a sample.
        captions: Number of images by their number of captions.
        unreadable: Messages of images that could not be read; empty if none was tried.
        peculiar: Numbers of images that other programs may show differently, by what they are.
    """

    counts: Mapping[str, Any]
    classes: Sequence[str]
    absent: Sequence[str]
    captions: Mapping[int, int]
    images: Sequence[str]
    unreadable: Sequence[str]
    peculiar: Mapping[str, int]


def check_data(
    source: Source[ImageSet | RegionImages],
    *,
    read: bool,
    track: Callable[[range, str, int], Iterable[int]] = lambda items, what, total: items,
) -> Findings:
    """Open the data as an evaluator does, and look.

    Args:
        source: As an evaluator holds it.
        read: Also decode every image and mask, and compare sizes.
        track: Shows how far the reading is: numbers, what, and how many.
    """
    opened = source()
    present = set(opened.labels)
    captions = opened.captions if isinstance(opened, ImageSet) else ()
    unreadable: list[str] = []
    peculiar: Counter[str] = Counter()
    for number in track(range(len(opened)), "reading images", len(opened)) if read else ():
        try:
            opened[number]
            image = opened.images[number]
            content = image.image_bytes() if isinstance(image, TarSample) else image
            peculiar.update(peculiarity(content))
        except (ValueError, FileNotFoundError) as error:
            unreadable.append(str(error))
    return Findings(
        counts=opened.counts,
        classes=opened.classes,
        absent=[name for label, name in enumerate(opened.classes) if label not in present],
        captions=Counter(map(len, captions)),
        images=opened.names,
        unreadable=unreadable,
        peculiar=peculiar,
    )


def training_images(where: str) -> set[str]:
    """Keys of the images of a training set: a COCO or Karpathy JSON, or shards."""
    if where.endswith(".json"):
        content = load_json(Path(where))
        images = content.get("images") if isinstance(content, Mapping) else None
        if not isinstance(images, list):
            raise ValueError(f"{where} has no images; give a COCO or Karpathy file, or shards")
        return {
            image_key(str(image.get("file_name", image.get("filename"))))
            for image in images
            if image.get("split", "train") in TRAINING_PARTS
        }
    urls = expand_shards(where)
    if not all(map(is_local, urls)):
        raise ValueError(f"{where}: shards of training data must be on this machine to be compared")
    samples = index_shards([local_path(url) for url in urls])
    origins = []
    for sample in samples:  # a key is a running number as a rule, which says nothing
        record = sample.record()
        origins += [str(record[key]) for key in ORIGINS if record.get(key)][:1]
    if not origins:
        raise ValueError(
            f"{where}: no sample says which photo it is ({', '.join(ORIGINS)} in its .json), so "
            "overlap cannot be found; give the annotation file that the shards were made from"
        )
    if len(origins) < len(samples):
        unknown = len(samples) - len(origins)
        log.warning("%s: %d of %d samples do not name their photo", where, unknown, len(samples))
    return {image_key(origin.rsplit("/", 1)[-1]) for origin in origins}


def image_key(name: str) -> str:
    """What names the same photo in different releases of a data set.

    >>> image_key("val2014/COCO_val2014_000000000285.jpg"), image_key("000000000285.jpg")
    ('285', '285')
    """
    stem = re.sub(r"^COCO_\w+?_(?=\d+$)", "", Path(name).stem)
    return stem.lstrip("0") or "0" if stem.isdigit() else stem


BORDER_SAMPLE = 100
WHITE = 250


@dataclass
class Report:
    """What is in some shards.

    Attributes:
        usable: Samples that training would use.
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
        for name in ("shards", "samples", "usable", "causes", "looked_at", "bordered"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples = {**other.examples, **self.examples}


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
            read_caption(raw, read_record(raw), "text", key=0)
            image = image_of(raw)
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
    for axis in (0, 1):
        lines = np.asarray(white.all(axis=axis))
        first, last = int(np.argmin(lines)), int(np.argmin(lines[::-1]))  # lines that are not white
        if min(first, last) >= max(1.0, 0.02 * len(lines)):
            return True
    return False
