"""Images with all their captions, for retrieval: from files, or from shards."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradeclip_ft.batch import PairBatch
from gradeclip_ft.data.coco import CaptionedPicture, read_captions
from gradeclip_ft.data.files import (
    decode_at,
    index_shards,
    load_json,
    prepare_files,
    read_image_at,
    read_json,
    require_images,
    subset,
    subset_protocol,
    tar_files,
)
from gradeclip_ft.data.loading import evaluation_loader
from gradeclip_ft.data.make_shards import CaptionedFile


@runtime_checkable
class Tokenize(Protocol):
    """Texts to token ids."""

    def __call__(self, texts: Sequence[str], *, trim: bool = False) -> Int[Tensor, "M L"]:
        """Ids of some texts, with `trim` no longer than needed."""
        ...


@dataclass(frozen=True)
class CaptionedImages(Dataset[tuple[Tensor, tuple[str, ...]]]):
    """Opened pairs: one image with its captions per item.

    Attributes:
        names: Of the images, which say which photo it is.
        captions: Of each image, in file order.
        read: Image number to its picture.
        files: Annotation files, which a fingerprint reads.
        listed: Images or shards, which a fingerprint lists.
        skipped: Left out, by cause.
        transform: The model's own preprocessing.
        tokenizer: Texts to token ids.
    """

    names: Sequence[str]
    captions: Sequence[tuple[str, ...]]
    read: Callable[[int], Image.Image]
    files: Sequence[Path]
    listed: Sequence[Path]
    skipped: dict[str, int]
    transform: Callable[[Image.Image], Tensor]
    tokenizer: Tokenize

    @property
    def counts(self) -> dict[str, Any]:
        """Images and captions that count, and those left out."""
        return {
            "images": len(self.captions),
            "captions": sum(map(len, self.captions)),
            "skipped": self.skipped,
        }

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 H W"], tuple[str, ...]]:
        """Image and captions number `index`.

        Raises:
            ValueError: The image cannot be read.
        """
        return self.transform(self.read(index)), self.captions[index]

    def join(self, samples: Sequence[tuple[Tensor, tuple[str, ...]]]) -> PairBatch:
        """Images of one batch with their captions flat."""
        captions = [captions for _, captions in samples]
        counts = torch.tensor([len(some) for some in captions])
        return PairBatch(
            images=torch.stack([image for image, _ in samples]),
            texts=self.tokenizer([text for some in captions for text in some], trim=True),
            owner=torch.arange(len(samples)).repeat_interleave(counts),
        )

    def batches(self, batch_size: int, workers: int) -> DataLoader[PairBatch]:
        """All pairs once, in file order; leaves torch's global random state alone."""
        return evaluation_loader(self, self.join, batch_size=batch_size, workers=workers)


FILE_COLUMNS = ("filename", "file_name", "file", "filepath", "image", "image_name", "path")
CAPTION_COLUMNS = ("caption", "text", "comment", "sentence", "title")


def coco_files(captions: Path, images: Path, exclude: Path | None = None) -> list[CaptionedFile]:
    """Images of a COCO captions file.

    Args:
        captions: `captions_*.json`, or a Karpathy split in that layout.
        images: Folder of the images.
        exclude: Another COCO file, whose images are left out: those of an evaluation.

    Raises:
        FileNotFoundError: A file or the folder does not exist.
        ValueError: A file is damaged or of another kind.
    """
    _require_folder(images)
    left_out = set()
    if exclude is not None:
        left_out = {entry.get("id") for entry in read_json(exclude, ("images",))["images"]}
    return [
        CaptionedFile(
            _inside(images, entry.file_name, captions), entry.captions, {"image_id": entry.id}
        )
        for entry in read_captions(captions)
        if entry.id not in left_out
    ]


def table_files(table: Path, images: Path) -> list[CaptionedFile]:
    """Images of a table, each once, with all its captions in the order of the rows.

    Raises:
        FileNotFoundError: The table or the folder does not exist.
        ValueError: No file names and captions can be made out, or a name leads out of the folder.
    """
    _require_folder(images)
    if not table.is_file():
        raise FileNotFoundError(f"no table {table}; it needs a file name and a caption per row")
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not in UTF-8 ({error}); convert it") from error
    found: dict[str, list[str]] = {}
    for name, caption in _rows(table, text):
        found.setdefault(name, []).append(caption)
    if not found:
        raise ValueError(f"{table} has no row with a file name and a caption")
    return [
        CaptionedFile(_inside(images, name, table), tuple(captions))
        for name, captions in found.items()
    ]


def _rows(table: Path, text: str) -> list[tuple[str, str]]:
    delimiter = "\t" if "\t" in text.split("\n", 1)[0] else ","
    file = io.StringIO(text, newline="")
    if delimiter == "," and table.suffix == ".csv":
        reader = csv.reader(file)
    else:  # a caption that begins with a quotation mark must not swallow the rows behind it
        reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    lines = [line for line in reader if any(map(str.strip, line))]
    if not lines:
        return []
    header = [column.strip().lower() for column in lines[0]]
    name = next((header.index(column) for column in FILE_COLUMNS if column in header), None)
    caption = next((header.index(column) for column in CAPTION_COLUMNS if column in header), None)
    if name is not None and caption is not None:
        lines, width = lines[1:], len(header)
    elif len(lines[0]) >= 2 and re.search(r"\.\w{3,4}(#\d+)?$", lines[0][0].strip()):
        name, caption, width = 0, 1, 2
    else:
        raise ValueError(
            f"{table} begins with {lines[0]}; expected a header with one of "
            f"{', '.join(FILE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}, or rows of "
            "file name and caption"
        )
    return [
        (re.sub(r"#\d+$", "", line[name].strip()), _caption(line, caption, width, delimiter))
        for line in lines
        if len(line) > max(name, caption)
    ]


def _caption(line: Sequence[str], column: int, width: int, delimiter: str) -> str:
    """A caption in the last column may hold the delimiter, unquoted."""
    if column == width - 1:
        return delimiter.join(line[column:]).strip()
    return line[column].strip()


def _inside(folder: Path, name: str, table: Path) -> Path:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{table} names {name}, which is not below {folder}; use relative names")
    return folder / path


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; set images= to where the images are")


def read_pictures(path: Path, images: Path, part: str | None) -> list[CaptionedPicture]:
    """All images of a file with their captions.

    Args:
        path: The file.
        images: Folder of the images, for tables.
        part: Split of a file that holds several: "test", "val", "train", "restval".

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged, of another kind, or holds no such part.
    """
    content = load_json(path) if path.suffix == ".json" else None
    if isinstance(content, Mapping) and _is_karpathy(content):
        return _karpathy(path, content["images"], part)
    if part is not None:
        raise ValueError(f"{path} holds one split alone; leave part={part} out")
    if isinstance(content, Mapping):
        return read_captions(path)
    if isinstance(content, Sequence):
        return [_listed(path, row, entry) for row, entry in enumerate(content)]
    return [
        CaptionedPicture(row, file.image.relative_to(images).as_posix(), file.captions)
        for row, file in enumerate(table_files(path, images))
    ]


def only_named(pictures: Sequence[CaptionedPicture], names: Path) -> list[CaptionedPicture]:
    """Those that a text file names, one per line, with or without the suffix.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A name that no image has.
    """
    if not names.is_file():
        raise FileNotFoundError(f"no list of names {names}; one file name per line")
    wanted = {Path(line.strip()).name for line in names.read_text("utf-8").splitlines()} - {""}
    found = [
        picture
        for picture in pictures
        if {Path(picture.file_name).name, Path(picture.file_name).stem} & wanted
    ]
    if len(found) < len(wanted):
        known = {name for p in found for name in (Path(p.file_name).name, Path(p.file_name).stem)}
        missing = sorted(wanted - known)
        raise ValueError(
            f"{names}: {len(missing)} of {len(wanted)} names have no caption, first {missing[0]}; "
            "names and captions must be of one data set"
        )
    return found


def _is_karpathy(content: Mapping[str, Any]) -> bool:
    images = content.get("images")
    return isinstance(images, list) and bool(images) and "sentences" in images[0]


def _karpathy(
    path: Path, images: Sequence[Mapping[str, Any]], part: str | None
) -> list[CaptionedPicture]:
    parts = Counter(str(entry.get("split")) for entry in images)
    if part not in parts:
        there = ", ".join(f"{name} ({count})" for name, count in parts.items())
        raise ValueError(f"{path} has no part {part}; set part= to one of {there}")
    return [
        CaptionedPicture(
            int(entry.get("cocoid", entry.get("imgid", row))),
            "/".join(filter(None, (entry.get("filepath"), _value(path, row, entry, "filename")))),
            tuple(str(sentence.get("raw", "")).strip() for sentence in entry["sentences"]),
        )
        for row, entry in enumerate(images)
        if entry.get("split") == part
    ]


def _listed(path: Path, row: int, entry: Any) -> CaptionedPicture:
    captions = _value(path, row, entry, "caption")
    several = [captions] if isinstance(captions, str) else captions
    return CaptionedPicture(
        row, str(_value(path, row, entry, "image")), tuple(str(text).strip() for text in several)
    )


def _value(path: Path, row: int, entry: Any, key: str) -> Any:
    if not isinstance(entry, Mapping) or key not in entry:
        raise ValueError(f"{path}: image number {row} has no {key}; the file is of another kind")
    return entry[key]


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


KEYS = ("filename", "caption", "negative_caption")


@dataclass(frozen=True)
class CaptionChoices:
    """A folder of `KIND.json`: {"0": {"filename", "caption", "negative_caption"}, ...}.

    Attributes:
        folder: Of the JSON files.
        images: Folder of the images, COCO val2017 for SugarCrepe.
        kinds: Names of the files without `.json`; None for all.
        limit: Only so many images, drawn with `limit_seed`; None for all.
        limit_seed: Of that draw.
    """

    folder: str
    images: str
    kinds: tuple[str, ...] | list[str] | None = None
    limit: int | None = None
    limit_seed: int = 0

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        kinds = "all" if self.kinds is None else list(self.kinds)
        return {"kinds": kinds, **subset_protocol(self.limit, self.limit_seed)}

    def prepare(self) -> None:
        """Check that files and images are there.

        Raises:
            FileNotFoundError: They are not.
        """
        self._files()
        if not Path(self.images).is_dir():
            raise FileNotFoundError(f"no folder {self.images}; set images= to where they are")

    def __call__(
        self, *, transform: Callable[[Image.Image], Tensor], tokenizer: Tokenize
    ) -> tuple[CaptionedImages, list[str]]:
        """Images with their captions, right and wrong in turn, and the kind of each two.

        Raises:
            FileNotFoundError: A file or an image is missing.
            ValueError: A file is damaged or of another kind.
        """
        self.prepare()
        files = self._files()
        captions: dict[str, list[str]] = {}
        kinds: dict[str, list[str]] = {}
        for path in files:
            for name, right, wrong in _entries(path):
                captions.setdefault(name, []).extend((right, wrong))
                kinds.setdefault(name, []).append(path.stem)
        names = subset(list(captions), self.limit, self.limit_seed)
        folder = Path(self.images)
        require_images(folder, list(enumerate(names)))
        paths = [folder / name for name in names]
        opened = CaptionedImages(
            names=names,
            captions=[tuple(captions[name]) for name in names],
            read=partial(read_image_at, paths),
            files=files,
            listed=paths,
            skipped={},
            transform=transform,
            tokenizer=tokenizer,
        )
        return opened, [kind for name in names for kind in kinds[name]]

    def _files(self) -> list[Path]:
        folder = Path(self.folder)
        if self.kinds is None:
            files = sorted(folder.glob("*.json"))
        else:
            files = [folder / f"{kind}.json" for kind in self.kinds]
        missing = [path.name for path in files if not path.is_file()]
        if missing or not files:
            raise FileNotFoundError(
                f"no {', '.join(missing) or '.json'} in {folder}; fetch the files of the "
                "benchmark or set folder="
            )
        return files


def _entries(path: Path) -> list[tuple[str, str, str]]:
    content = load_json(path)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no entries by number; it is a file of another kind")
    found = []
    for key, entry in content.items():
        missing = [name for name in KEYS if not isinstance(entry, Mapping) or name not in entry]
        if missing:
            raise ValueError(f"{path}: entry {key} has no {', '.join(missing)}")
        found.append((entry["filename"], entry["caption"], entry["negative_caption"]))
    return found
