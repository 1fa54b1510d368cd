"""Your own photos: files with a table of captions, or with a `.txt` each, read as they are.

One set of photos has two parts, to train on and held out; the settings that say which are those of
`Photos`, which training and evaluation share.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gradeclip_ft.data.captions import CaptionData
from gradeclip_ft.data.files import ImageSet
from gradeclip_ft.data.make_shards import CaptionedFile
from gradeclip_ft.data.order import LoaderWorker, each_row_once
from gradeclip_ft.data.pairs import table_files
from gradeclip_ft.data.samples import caption_lines
from gradeclip_ft.data.shards import RawSample, Skips, stable_hash
from gradeclip_ft.images import ImageError, check_image, images_in
from gradeclip_ft.text.phrases import prepare_tagger

log = logging.getLogger(__name__)
Parts = tuple[list[CaptionedFile], list[CaptionedFile]]


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Captioned photos in two parts.

    Attributes:
        table: Captions in any layout of `pairs.read_captioned`; None: each photo has its own in a
            `.txt` of the same name.
        images: Folder of the photos, in which the file names of the table begin; None: the
            folder of the table.
        columns: Names of the table's columns with file name and caption; None for usual ones.
        holdout: What is held out of training: a share of the photos (below 1), their number, or
            another table.
        holdout_seed: Of the draw, by file names: it does not depend on other rows or their order.
    """

    table: str | None = None
    images: str | None = None
    columns: Sequence[str] | None = None
    holdout: float | int | str = 0.1
    holdout_seed: int = 0

    @property
    def folder(self) -> Path:
        """Where file names begin."""
        if self.images is None and self.table is None:
            raise ValueError(
                "no photos; set data.table= to a table of file names and captions, data.images= to "
                "their folder, or both"
            )
        return Path(self.table or "").parent if self.images is None else Path(self.images)

    @cached_property  # every epoch asks for them
    def parts(self) -> Parts:
        """Photos to train on, and those held out; a photo is in one of them, with all captions.

        Raises:
            FileNotFoundError: No such table or folder.
            ValueError: The table cannot be read, or nothing would be left to train on.
        """
        columns = None if self.columns is None else tuple(self.columns)
        folder, holdout = self.folder, self.holdout
        files = _files(self.table, folder, columns)
        if isinstance(holdout, str):
            held = _files(holdout, folder, columns)
        else:
            if holdout >= 1 and holdout != int(holdout):
                raise ValueError(
                    f"data.holdout={holdout}, expected a share below 1 or a whole number of "
                    "photos; set data.holdout=0.1, or the number to hold out"
                )
            number = holdout if holdout >= 1 or not holdout else max(1, round(holdout * len(files)))

            def draw(file: CaptionedFile) -> int:
                name = file.image.relative_to(folder).as_posix()
                return stable_hash(f"{self.holdout_seed}/{name}")

            held = sorted(files, key=draw)[: int(number)]
        away = {file.image for file in held}
        rest = [file for file in files if file.image not in away]
        if not rest:
            raise ValueError(
                f"data.holdout={holdout} leaves none of {len(files)} photos to train on; give a "
                "share below 1, a smaller number, or a table of other photos"
            )
        return rest, sorted(held, key=lambda file: file.image)


def _files(table: str | None, folder: Path, columns: tuple[str, ...] | None) -> list[CaptionedFile]:
    """Photos with at least one caption."""
    if table is None and not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; set data.images= to where the photos are")
    found = (
        list(_with_texts(folder)) if table is None else table_files(Path(table), folder, columns)
    )
    files = [file for file in found if any(map(str.strip, file.captions))]
    if not files:
        raise ValueError(
            f"no photo with a caption in {table or folder}; name a table as data.table=, or put a "
            ".txt with its captions beside each photo"
        )
    if len(files) < len(found):
        log.warning(
            "%s: left out %d photos without a caption", table or folder, len(found) - len(files)
        )
    return files


def _with_texts(folder: Path) -> Iterator[CaptionedFile]:
    """Photos below a folder, with the captions of the `.txt` of the same name, one in each line."""
    for path in images_in(folder, below=True):
        text = path.with_suffix(".txt")
        told = text.read_text("utf-8-sig", errors="replace") if text.is_file() else ""
        yield CaptionedFile(path, tuple(caption_lines(told)))


@dataclass(frozen=True, kw_only=True)
class PhotoTrainData(CaptionData, Photos):
    """Photos to train on, each once per epoch, in an order of seed and epoch.

    Batches, resuming and counting of unusable photos are those of `CaptionTrainData`.
    """

    @property
    def resampled(self) -> bool:
        """Every process has its own share of an epoch."""
        return False

    def prepare(self) -> dict[str, Any]:
        """Check photos and tagger.

        Raises:
            FileNotFoundError: More photos are missing than `max_dropped` allows.
        """
        self._check()
        missing = self.require_photos()
        files, held = self.parts
        if missing:
            log.warning(
                "%d of %d photos are missing, first %s", len(missing), len(files), missing[0]
            )
        self.tokenizer.warn_of_unknown(text for file in files for text in file.captions)
        lines = (f"{file.image.relative_to(self.folder)} {file.captions}" for file in files)
        return {
            "tagger": prepare_tagger(self.tagger) if self.max_phrases else None,
            "photos": len(files),
            "held_out": len(held),
            "fingerprint": hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest(),
            "samples_per_epoch": len(files),
            "resampled": False,
        }

    def require_photos(self, count: int | None = None) -> list[Path]:
        """Those that are missing, of about so many evenly spread photos; of all for None.

        Raises:
            FileNotFoundError: More than `max_dropped` allows.
        """
        files = self.parts[0]
        files = files[:: max(1, len(files) // (count or len(files)))]
        missing = [file.image for file in files if not file.image.is_file()]
        if len(missing) > self.max_dropped * len(files):
            first = missing[0].relative_to(self.folder)
            like = (path for path in images_in(self.folder, below=True) if path.stem == first.stem)
            if (self.folder.parent / first).is_file():
                remedy = (
                    f"the file names begin with {first.parts[0]} already: set "
                    f"data.images={self.folder.parent}"
                )
            elif (other := next(like, None)) is not None:
                name = other.relative_to(self.folder).as_posix()
                remedy = f"{first} is {name} there; the table must name it so"
            else:
                remedy = "set data.images= to the folder in which the file names begin"
            raise FileNotFoundError(
                f"{len(missing)} of {len(files)} photos are not in {self.folder}, first {first}; "
                f"{remedy}"
            )
        return missing

    def epoch_size(self) -> int:
        """All of them."""
        return len(self.parts[0])

    def samples(self, world_size: int) -> PhotoSamples:
        """The files."""
        return PhotoSamples(self.parts[0], self.folder, str(self.table or self.folder))

    def held_out_samples(self) -> PhotoSamples:
        """The other part, or the same where nothing is held out."""
        rest, held = self.parts
        return PhotoSamples(held or rest, self.folder, str(self.table or self.folder))


@dataclass(frozen=True)
class PhotoSamples:
    """Files as raw samples; their names are those below `folder`."""

    files: Sequence[CaptionedFile]
    folder: Path
    where: str

    def __call__(self, worker: LoaderWorker, part: range, skips: Skips) -> Iterator[RawSample]:
        """Those of one worker; a file that cannot be read becomes a sample without an image."""
        for row in each_row_once(len(self.files), part, worker):
            file = self.files[row]
            sample = {
                "__key__": file.image.relative_to(self.folder).as_posix(),
                "__url__": self.where,
                "json": json.dumps({"captions": file.captions}).encode(),
            }
            try:
                sample["jpg"] = file.image.read_bytes()  # of any format
            except OSError:
                log.debug("%s cannot be read", file.image, exc_info=True)
            yield sample


@dataclass(frozen=True, kw_only=True)
class HeldOutPhotos(Photos):
    """The part that training does not see, for retrieval."""

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        drawn = f", drawn with seed {self.holdout_seed}"
        held = self.holdout if isinstance(self.holdout, str) else f"{self.holdout}{drawn}"
        source = Path(self.table or self.images or "").name
        return {"split": f"held out of {source}: {held}", "captions": "all of each image, plain"}

    def prepare(self) -> None:
        """Check that something is held out."""
        if not self.parts[1]:
            raise ValueError(
                "no photo is held out to measure on; set data.holdout= to a share, a number or a "
                "table, or evaluator=[] to measure nothing"
            )

    def __call__(self) -> ImageSet:
        """The photos that can be read; training would pass over the others, too."""
        self.prepare()
        skipped: Counter[str] = Counter()
        files = []
        for file in self.parts[1]:
            try:
                check_image(file.image)
            except FileNotFoundError:
                skipped["missing_image"] += 1
            except ImageError as error:
                skipped[error.cause] += 1
            else:
                files.append(file)
        if not files:
            raise FileNotFoundError(
                f"none of the {skipped.total()} photos held out can be read ({dict(skipped)}); set "
                "data.images= to their folder"
            )
        tables = [path for path in (self.table, self.holdout) if isinstance(path, str)]
        return ImageSet(
            images=[file.image for file in files],
            names=[file.image.relative_to(self.folder).as_posix() for file in files],
            listed=[file.image for file in files],
            files=[Path(path) for path in tables],
            captions=[tuple(filter(str.strip, file.captions)) for file in files],
            skipped=skipped,
        )
