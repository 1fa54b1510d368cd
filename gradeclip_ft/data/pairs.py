"""Images with all their captions, for retrieval: from files, or from shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from gradeclip_ft.data.caption_layouts import only_named, read_pictures
from gradeclip_ft.data.coco import CaptionedPicture
from gradeclip_ft.data.files import prepare_files, read_image_at, require_images
from gradeclip_ft.data.pair_images import CaptionedImages, Tokenize
from gradeclip_ft.data.subset import subset, subset_protocol
from gradeclip_ft.data.tar_index import decode_at, index_shards, tar_files


@dataclass(frozen=True)
class CaptionFile:
    """Image files, and a file with their captions in any layout of `caption_layouts`.

    Attributes:
        annotations: The file with the captions.
        images: Folder of the images.
        split: Its name in the protocol: recalls of different splits cannot be compared.
        part: Which split of a file that holds several.
        names: Text file that names the images of the split, where the captions have more.
        expected: Number of images the split has; any other number is refused.
        limit: Only so many images, drawn with `limit_seed`; None for all.
        limit_seed: Of that draw.
        make: Called when the annotation file does not exist, to make it.
    """

    annotations: str
    images: str
    split: str
    part: str | None = None
    names: str | None = None
    expected: int | None = None
    limit: int | None = None
    limit_seed: int = 0
    make: Callable[[], object] | None = None

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        return _protocol(self.split, self.limit, self.limit_seed)

    def prepare(self) -> None:
        """Make what can be made; cheap when it is there.

        Raises:
            FileNotFoundError: A file or folder is missing and nothing makes it.
        """
        prepare_files(self.annotations, (self.images,), self.make)

    def __call__(
        self, *, transform: Callable[[Image.Image], Tensor], tokenizer: Tokenize
    ) -> CaptionedImages:
        """The pairs as a model wants them; images without a caption are left out and counted.

        Raises:
            FileNotFoundError: Images are missing.
            ValueError: The file is damaged, has another number of images, or no caption at all.
        """
        self.prepare()
        folder = Path(self.images)
        pictures = read_pictures(Path(self.annotations), folder, self.part)
        if self.names is not None:
            pictures = only_named(pictures, Path(self.names))
        _require_number(self.annotations, len(pictures), self.split, self.expected)
        pictures = subset(pictures, self.limit, self.limit_seed)
        require_images(folder, [(entry.id, entry.file_name) for entry in pictures])
        captioned, skipped = _with_captions(self.annotations, pictures)
        paths = [folder / picture.file_name for picture in captioned]
        return CaptionedImages(
            names=[picture.file_name for picture in captioned],
            captions=[picture.captions for picture in captioned],
            read=partial(read_image_at, paths),
            files=[Path(path) for path in (self.annotations, self.names) if path is not None],
            listed=paths,
            skipped=skipped,
            transform=transform,
            tokenizer=tokenizer,
        )


@dataclass(frozen=True)
class CaptionShards:
    """CLIP_benchmark's webdataset: `N.tar` with an image and a `.txt`, one caption per line.

    Attributes:
        folder: Of the split, with `nshards.txt` and the shards.
        split: Its name in the protocol.
        expected: Number of images the split has; any other number is refused.
        limit: Only so many images, drawn with `limit_seed`; None for all.
        limit_seed: Of that draw.
    """

    folder: str
    split: str
    expected: int | None = None
    limit: int | None = None
    limit_seed: int = 0

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        return _protocol(self.split, self.limit, self.limit_seed)

    def prepare(self) -> None:
        """Check that the shards are there.

        Raises:
            FileNotFoundError: They are not, or not all of them.
        """
        tar_files(Path(self.folder))

    def __call__(
        self, *, transform: Callable[[Image.Image], Tensor], tokenizer: Tokenize
    ) -> CaptionedImages:
        """The pairs as a model wants them; images without a caption are left out and counted.

        Raises:
            FileNotFoundError: Shards are missing.
            ValueError: A shard is damaged, or the number of images is another one.
        """
        shards = tar_files(Path(self.folder))
        samples = index_shards(shards)
        _require_number(self.folder, len(samples), self.split, self.expected)
        samples = subset(samples, self.limit, self.limit_seed)
        pictures = [
            CaptionedPicture(row, sample.key, _lines(sample.text("txt")))
            for row, sample in enumerate(samples)
        ]
        captioned, skipped = _with_captions(self.folder, pictures)
        return CaptionedImages(
            names=[picture.file_name for picture in captioned],
            captions=[picture.captions for picture in captioned],
            read=partial(decode_at, [samples[picture.id] for picture in captioned]),
            files=[],
            listed=shards,
            skipped=skipped,
            transform=transform,
            tokenizer=tokenizer,
        )


def _protocol(split: str, limit: int | None, seed: int) -> dict[str, Any]:
    captions = "all of each image, plain"
    return {"split": split, "captions": captions, **subset_protocol(limit, seed)}


def _require_number(where: str, found: int, split: str, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise ValueError(
            f"{where} lists {found} images, split {split} has {expected}; choose the file of that "
            "split"
        )


def _with_captions(
    where: str, pictures: Sequence[CaptionedPicture]
) -> tuple[list[CaptionedPicture], dict[str, int]]:
    """Images with at least one caption that is not empty, and how many have none."""
    some = [replace(entry, captions=tuple(filter(None, entry.captions))) for entry in pictures]
    captioned = [entry for entry in some if entry.captions]
    if not captioned:
        raise ValueError(f"{where} has no image with a caption")
    missing = len(pictures) - len(captioned)
    return captioned, {"image without caption": missing} if missing else {}


def _lines(text: str) -> tuple[str, ...]:
    """Captions of a `.txt`; line breaks inside a caption are written as a backslash and an n."""
    return tuple(" ".join(line.replace("\\n", " ").split()) for line in text.splitlines())
