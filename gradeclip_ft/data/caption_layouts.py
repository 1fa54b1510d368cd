"""Images with captions in the layouts they are published in, told apart by their content.

COCO's captions file; Karpathy's `dataset_*.json`, which holds several splits; a JSON list of image
and captions; tables of file name and caption (Karpathy's text files, Flickr30k's `.token` file).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradeclip_ft.data.captioned_files import table_files
from gradeclip_ft.data.coco import CaptionedPicture, read_captions
from gradeclip_ft.data.files import load_json


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
