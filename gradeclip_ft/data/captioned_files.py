"""Captioned image files from elsewhere: COCO caption files, and tables of file name and caption.

Tables as they are found: with a header (`filename,caption`, any order and further columns), the
Karpathy text files of Flickr30k (`NAME.jpg,caption`, commas in captions unquoted), and the classic
ones (`NAME.jpg#0<TAB>caption`).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from gradeclip_ft.data.coco import read_captions
from gradeclip_ft.data.files import read_json
from gradeclip_ft.data.shards import CaptionedFile

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
