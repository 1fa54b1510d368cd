"""Images with all their captions: from files in every public layout, or from shards."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradeclip_ft.data.coco import CaptionedImage, read_captions, read_image_ids, texts_of
from gradeclip_ft.data.files import (
    ImageSet,
    index_shards,
    load_json,
    prepare_files,
    require_images,
    subset,
    subset_protocol,
    tar_files,
    visible,
)
from gradeclip_ft.data.make_shards import CaptionedFile
from gradeclip_ft.data.samples import caption_lines

FILE_COLUMNS = (
    *("filename", "file_name", "file", "filepath", "file_path", "path"),
    *("image", "image_name", "image_path", "image_file", "img", "photo"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "comment", "sentence", "title", "description", "alt"),
)
USUAL = f"one of {', '.join(FILE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}"
OTHERS = "columns=[FILE,CAPTION] names others (data.columns= in train)"
FILE_NAME = r"\.\w{3,4}(#\d+)?$"
"""How the name of an image ends; Flickr30k's table numbers its captions: `img.jpg#0`."""
MOST_LINES = 20  # of a quoted caption; a lone quotation mark must not swallow the rows after it

log = logging.getLogger(__name__)


def coco_files(captions: Path, images: Path, exclude: Path | None = None) -> list[CaptionedFile]:
    """Images of a COCO captions file.

    Args:
        captions: `captions_*.json`, or a Karpathy split in that layout.
        images: Folder of the images.
        exclude: Another COCO file, whose images are left out: those of an evaluation.
    """
    _require_folder(images)
    left_out = set() if exclude is None else read_image_ids(exclude)
    skipped: Counter[str] = Counter()
    found = [image for image in read_captions(captions, skipped) if image.id not in left_out]
    _tell(captions, skipped)
    return [
        CaptionedFile(
            _inside(images, image.file_name, captions), image.captions, {"image_id": image.id}
        )
        for image in _grouped((image.file_name, image.captions, image.id) for image in found)
    ]


def table_files(
    table: Path, images: Path, columns: Sequence[str] | None = None
) -> list[CaptionedFile]:
    """Images of a table, each once, with all its captions in the order of the rows.

    Args:
        table: In any layout of `read_captioned`.
        images: Folder of the images.
        columns: Names of the columns with file name and caption; None for the usual ones.
    """
    _require_folder(images)
    skipped: Counter[str] = Counter()
    found = _grouped(  # by path: `./1.jpg` is the photo `1.jpg`
        (str(_inside(images, image.file_name, table)), image.captions, None)
        for image in read_captioned(table, None, skipped, columns)
    )
    _tell(table, skipped)
    return [CaptionedFile(Path(image.file_name), image.captions) for image in found]


def _tell(path: Path, skipped: Counter[str]) -> None:
    for cause, number in skipped.items():
        log.warning("%s: left out %d (%s)", path, number, cause)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; set images= to where the images are")


def _inside(folder: Path, name: str, table: Path) -> Path:
    path = Path(os.path.abspath(folder / name))
    if not path.is_relative_to(os.path.abspath(folder)):
        raise ValueError(f"{table} names {name}, which is not below {folder}; use names below it")
    return folder / path.relative_to(os.path.abspath(folder))


def read_captioned(
    path: Path, part: str | None, skipped: Counter[str], columns: Sequence[str] | None = None
) -> list[CaptionedImage]:
    """All images of a file with their captions, each image once, in any public layout.

    Args:
        path: COCO's or Karpathy's JSON, a JSON list of images, JSON lines, or a table.
        part: Split of a file that holds several: "test", "val", "train", "restval".
        skipped: Gets the numbers of rows and captions that cannot be used, by cause.
        columns: Names of file name and caption in a table or in JSON lines; None for usual ones.
    """
    lines = path.suffix in (".jsonl", ".ndjson") or (path.suffix == ".json" and _has_lines(path))
    content = load_json(path) if path.suffix == ".json" and not lines else None
    if lines:
        content = _json_lines(path)
    images = content.get("images") if isinstance(content, Mapping) else None
    if isinstance(images, list) and any("sentences" in entry for entry in images[:1]):
        return _grouped(_karpathy(path, images, part, skipped))
    if part is not None:
        raise ValueError(f"{path} holds one split alone; leave part={part} out")
    if isinstance(content, Mapping):
        found = read_captions(path, skipped)
        return _grouped((image.file_name, image.captions, image.id) for image in found)
    if isinstance(content, list):
        return _grouped(_listed(path, content, skipped, columns))
    return _grouped(_rows(path, skipped, columns))


def _grouped(
    entries: Iterable[tuple[str, tuple[str, ...], int | None]],
) -> list[CaptionedImage]:
    """One image per file name: a layout may have a row, or an id, for every caption.

    As two images they would be each other's wrong answer.
    """
    captions: dict[str, list[str]] = {}
    ids: dict[str, int] = {}
    for name, some, key in entries:
        ids.setdefault(name, len(ids) if key is None else key)
        captions.setdefault(name, []).extend(some)
    return [CaptionedImage(ids[name], name, tuple(some)) for name, some in captions.items()]


def _karpathy(
    path: Path, images: Sequence[Mapping[str, Any]], part: str | None, skipped: Counter[str]
) -> Iterator[tuple[str, tuple[str, ...], int]]:
    parts = Counter(str(entry.get("split")) for entry in images)
    if part not in parts:
        there = ", ".join(f"{name} ({count})" for name, count in parts.items())
        raise ValueError(f"{path} has no part {part}; set part= to one of {there}")
    for row, entry in enumerate(images):
        if entry.get("split") == part:
            folder, name = entry.get("filepath"), _value(path, row, entry, "filename")
            raw = texts_of((sentence.get("raw") for sentence in entry["sentences"]), skipped)
            key = int(entry.get("cocoid", entry.get("imgid", row)))
            yield "/".join(filter(None, (folder, name))), raw, key


def _listed(
    path: Path, content: Sequence[Any], skipped: Counter[str], columns: Sequence[str] | None
) -> Iterator[tuple[str, tuple[str, ...], None]]:
    keys = list(content[0]) if content and isinstance(content[0], Mapping) else []
    found = _places(path, keys, columns)
    if found is None and keys:
        raise ValueError(f"{path} has the keys {', '.join(keys)}; expected {USUAL}; {OTHERS}")
    image, caption = ("image", "caption") if found is None else (keys[found[0]], keys[found[1]])
    for row, entry in enumerate(content):
        captions = _value(path, row, entry, caption)
        name = _value(path, row, entry, image)
        if not isinstance(name, str):
            raise ValueError(f"{path}: image number {row} is {name!r}, expected a file name")
        several = captions if isinstance(captions, list) else [captions]
        yield name, texts_of(several, skipped), None


def _has_lines(path: Path) -> bool:
    """Whether the first of several lines is an object of its own: JSON lines under another name."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        first, more = file.readline(), file.readline()
    try:
        return bool(more.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path) -> list[Any]:
    lines = [line for line in _text_of(path).split("\n") if line.strip()]
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds a line that is not JSON ({error})") from error


def _value(path: Path, row: int, entry: Any, key: str) -> Any:
    if not isinstance(entry, Mapping) or key not in entry:
        raise ValueError(f"{path}: image number {row} has no {key}; the file is of another kind")
    return entry[key]


def _text_of(table: Path) -> str:
    if not table.is_file():
        raise FileNotFoundError(f"no table {table}; it needs a file name and a caption per row")
    try:
        return table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{table} is not a text in UTF-8 ({error}); save it as .csv in UTF-8"
        ) from error


def _places(
    table: Path, header: Sequence[str], columns: Sequence[str] | None
) -> tuple[int, int] | None:
    """Where file name and caption are in the header of a table; None where it is not one."""
    names = [name.strip().strip('"').lower() for name in header]
    wanted = (FILE_COLUMNS, CAPTION_COLUMNS)
    if columns is not None:
        wanted = tuple((name.strip().lower(),) for name in columns)  # type: ignore[assignment]
    found = [next((names.index(c) for c in group if c in names), None) for group in wanted]
    if columns is not None and (len(found) != 2 or None in found):
        raise ValueError(
            f"{table} has the columns {', '.join(header)}; set columns= to those of file name and "
            f"caption, such as [{','.join(header[:2])}]"
        )
    name, caption = found
    return None if name is None or caption is None else (name, caption)


def _rows(
    table: Path, skipped: Counter[str], columns: Sequence[str] | None
) -> list[tuple[str, tuple[str, ...], None]]:
    """File name and caption of each row of a table with commas, semicolons or tabs."""
    lines = [line.rstrip("\r") for line in _text_of(table).split("\n")]
    head = lines[0]
    delimiter = "\t" if "\t" in head else ";" if ";" in head and "," not in head else ","
    first = next((row for line in lines if (row := line.split(delimiter)) != [""]), [""])
    places = _places(table, first, columns)
    if places is not None:
        name, caption = places
        lines, width = lines[lines.index(delimiter.join(first)) + 1 :], len(first)
    elif len(first) >= 2 and re.search(FILE_NAME, first[0].strip().strip('"')):
        name, caption, width = 0, 1, 2
    else:
        raise ValueError(
            f"{table} begins with {first}; expected a header with {USUAL}, or rows of file name "
            f"and caption; {OTHERS}"
        )
    found: list[tuple[str, tuple[str, ...], None]] = []
    for row in _records(lines, delimiter, width):
        if len(row) <= max(name, caption) or not row[name].strip():
            skipped["row without file name and caption"] += 1
            continue
        # a caption in the last column may hold the delimiter, unquoted
        parts = row[caption:] if caption == width - 1 else [row[caption]]
        told = re.sub(r"\s*\n\s*", " ", delimiter.join(parts)).strip()
        found.append((re.sub(r"#\d+$", "", row[name].strip()), (told,), None))
    if not found:
        raise ValueError(f"{table} has no row with a file name and a caption")
    return found


def _records(lines: Sequence[str], delimiter: str, width: int) -> Iterator[list[str]]:
    """Rows by the rules of csv; a row whose quotes do not follow them is taken as it is written.

    Flickr30k's tables quote nothing, so that a caption may begin with a quotation mark; tables of
    pandas and spreadsheets quote what holds delimiters, quotation marks and line breaks.
    """
    at = 0
    while at < len(lines):
        row, end = lines[at].split(delimiter), at + 1
        for stop in range(at + 1, min(at + MOST_LINES, len(lines)) + 1 if '"' in lines[at] else 0):
            if stop > at + 1 and re.search(
                FILE_NAME, lines[stop - 1].split(delimiter)[0].strip('"')
            ):
                break  # the next row
            text = io.StringIO("\n".join(lines[at:stop]), newline="")
            try:
                (quoted,) = csv.reader(text, delimiter=delimiter, strict=True)
            except csv.Error as error:
                if "unexpected end" in str(error):
                    continue  # the quoted field has a line break
                break
            if len(quoted) <= width:
                row, end = quoted, stop
            break
        if any(map(str.strip, row)):
            yield row
        at = end


def only_named(images: Sequence[CaptionedImage], names: Path) -> list[CaptionedImage]:
    """Those that a text file names, one per line, with or without the suffix."""
    if not names.is_file():
        raise FileNotFoundError(f"no list of names {names}; one file name per line")
    wanted = {Path(line.strip()).name for line in names.read_text("utf-8").splitlines()} - {""}
    found, known = [], set()
    for image in images:
        path = Path(image.file_name)
        known |= {path.name, path.stem}
        if {path.name, path.stem} & wanted:
            found.append(image)
    if len(found) < len(wanted):
        missing = sorted(wanted - known)
        raise ValueError(
            f"{names}: {len(missing)} of {len(wanted)} names have no caption, first {missing[0]}; "
            "names and captions must be of one data set"
        )
    return found


@dataclass(frozen=True)
class CaptionFile:
    """Image files, and a file with their captions in any layout of `read_captioned`.

    Attributes:
        annotations: The file with the captions.
        images: Folder of the images.
        split: Its name in the protocol: recalls of different splits cannot be compared.
        part: Which split of a file that holds several.
        names: Text file that names the images of the split, where the captions have more.
    """

    annotations: str
    images: str
    split: str
    part: str | None = None
    names: str | None = None
    expected: int | None = None
    limit: int | None = None
    limit_seed: int = 0
    world: int = 1
    make: Callable[[], object] | None = None

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        world = {} if self.world == 1 else {"world": self.world}
        return {**_protocol(self.split, self.limit, self.limit_seed), **world}

    def prepare(self) -> None:
        """Make what can be made; cheap when it is there."""
        prepare_files(self.annotations, (self.images,), self.make)

    def __call__(self) -> ImageSet:
        """The images that count; those without a caption are left out and counted."""
        self.prepare()
        folder = Path(self.images)
        skipped: Counter[str] = Counter()
        images = read_captioned(Path(self.annotations), self.part, skipped)
        if self.names is not None:
            images = only_named(images, Path(self.names))
        _require_number(self.annotations, len(images), self.split, self.expected)
        images = subset(images, self.limit, self.limit_seed)
        require_images(folder, [(image.id, image.file_name) for image in images])
        captions = _captions(self.annotations, [image.captions for image in images], skipped)
        paths = [folder / images[row].file_name for row in captions]
        return ImageSet(
            images=paths,
            names=[images[row].file_name for row in captions],
            listed=paths,
            files=[Path(path) for path in (self.annotations, self.names) if path is not None],
            captions=list(captions.values()),
            skipped=skipped,
        )


@dataclass(frozen=True)
class RetrievalShards:
    """CLIP_benchmark's webdataset: `N.tar` with an image and a `.txt`, one caption per line.

    Attributes:
        folder: Of the split, with `nshards.txt` and the shards.
        split: Its name in the protocol.
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
        """Check that the shards are there."""
        tar_files(Path(self.folder))

    def __call__(self) -> ImageSet:
        """The images that count; those without a caption are left out and counted."""
        shards = tar_files(Path(self.folder))
        samples = index_shards(shards)
        _require_number(self.folder, len(samples), self.split, self.expected)
        samples = subset(samples, self.limit, self.limit_seed)
        skipped: Counter[str] = Counter()
        captions = _captions(
            self.folder, (tuple(caption_lines(sample.text("txt"))) for sample in samples), skipped
        )
        chosen = [samples[row] for row in captions]
        return ImageSet(
            images=chosen,
            names=[sample.key for sample in chosen],
            listed=shards,
            captions=list(captions.values()),
            skipped=skipped,
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


def _captions(
    where: str, captions: Iterable[tuple[str, ...]], skipped: Counter[str]
) -> dict[int, tuple[str, ...]]:
    """Captions that are not empty, by the row of their image; counts images without any."""
    found = {}
    for row, some in enumerate(captions):
        if kept := tuple(filter(None, some)):
            found[row] = kept
        else:
            skipped["image without caption"] += 1
    if not found:
        raise ValueError(f"{where} has no image with a caption")
    return found


@dataclass(frozen=True)
class CaptionChoices:
    """A folder of `KIND.json`: {"0": {"filename", "caption", "negative_caption"}, ...}.

    Attributes:
        folder: Of the JSON files.
        images: Folder of the images, COCO val2017 for SugarCrepe.
        kinds: Names of the files without `.json`; None for all.
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
        """Check that files and images are there."""
        self._files()
        _require_folder(Path(self.images))

    def __call__(self) -> ImageSet:
        """Images with their captions, right and wrong in turn, and the kind of each two."""
        self.prepare()
        files = self._files()
        captions: dict[str, list[str]] = {}
        kinds: dict[str, list[str]] = {}
        for path in files:
            for name, right, wrong in _choices(path):
                captions.setdefault(name, []).extend((right, wrong))
                kinds.setdefault(name, []).append(path.stem)
        names = subset(list(captions), self.limit, self.limit_seed)
        folder = Path(self.images)
        require_images(folder, list(enumerate(names)))
        paths = [folder / name for name in names]
        return ImageSet(
            images=paths,
            names=names,
            listed=paths,
            files=files,
            captions=[tuple(captions[name]) for name in names],
            kinds=[kind for name in names for kind in kinds[name]],
        )

    def _files(self) -> list[Path]:
        folder = Path(self.folder)
        if self.kinds is None:
            files = visible(folder.glob("*.json"))
        else:
            files = [folder / f"{kind}.json" for kind in self.kinds]
        missing = [path.name for path in files if not path.is_file()]
        if missing or not files:
            raise FileNotFoundError(
                f"no {', '.join(missing) or '.json'} in {folder}; fetch the files of the "
                "benchmark or set folder="
            )
        return files


def _choices(path: Path) -> Iterator[tuple[str, str, str]]:
    content = load_json(path)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no entries by number; it is a file of another kind")
    for key, entry in content.items():
        for name in ("filename", "caption", "negative_caption"):
            if not isinstance(entry, Mapping) or not isinstance(entry.get(name), str):
                raise ValueError(f"{path}: entry {key} has no {name} that is text")
        yield entry["filename"], entry["caption"], entry["negative_caption"]
