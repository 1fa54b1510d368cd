"""Every sample of a shard read as training reads it, and what would be skipped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray
from PIL import Image

from gradeclip_ft.data.samples import read_caption, read_image, read_record, sample_name
from gradeclip_ft.data.stream import BadSampleError, RawSample, Skips, read_shard

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
    read_caption(raw, {}, "text", key=0)
    read_record(raw)
    return read_image(raw)
