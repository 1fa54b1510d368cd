"""One raw sample: its captions, its image, and why it cannot be used if it cannot.

A sample is an image with captions: in a `.txt`, one in each line, in the `captions` or the
`caption` of a `.json`, or in both. These rules hold for training, `data verify` and `data phrases`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

from PIL import Image

from gradeclip_ft.data.shards import BadSampleError, RawSample, printable, shard_name
from gradeclip_ft.images import IMAGE_SUFFIXES, ImageError, check_image, read_image

TEXT_SUFFIXES = ("txt", "text", "caption")
SUFFIXES = frozenset((*IMAGE_SUFFIXES, *TEXT_SUFFIXES, "json"))
"""Files of a sample that are read; others are passed over."""
MOST_PIXELS = 64_000_000
MOST_ELONGATED = 20.0
MOST_CHARACTERS = 8000  # of a caption: more is not a description of a photo

Result = TypeVar("Result")
CaptionChoice = Literal["text", "any"]
"""The first caption, from the `.txt` if there is one; or at each visit any of `captions_of`."""


def sample_name(raw: RawSample) -> str:
    """Shard and key, for messages.

    >>> sample_name({"__url__": "data/cc3m-train-0004.tar", "__key__": "000041"})
    'cc3m-train-0004.tar:000041'
    """
    return f"{shard_name(raw['__url__'])}:{printable(raw['__key__'])}"


def read_record(raw: RawSample) -> dict[str, Any]:
    """The sample's JSON; empty without one.

    Raises:
        BadSampleError: "broken_json".
    """
    try:
        record = json.loads(raw.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise BadSampleError("broken_json", str(error)) from error
    if not isinstance(record, dict):
        raise BadSampleError("broken_json", f"it holds a {type(record).__name__}, not an object")
    return record


def captions_of(raw: RawSample, record: Mapping[str, Any]) -> list[str]:
    """All captions, each in one line: `captions` of the JSON, else the `.txt`, else `caption`.

    Raises:
        BadSampleError: "missing_text", "bad_encoding", or "empty_caption".
    """
    listed = record.get("captions")
    lines = (
        [_one_line(entry) for entry in listed if isinstance(entry, str)]
        if isinstance(listed, list)
        else []
    )
    captions = [line for line in lines if line] or _text_lines(raw, record)
    if not captions and isinstance(alone := record.get("caption"), str):
        captions = [line] if (line := _one_line(alone)) else []
    if not captions:
        if any(suffix in raw for suffix in TEXT_SUFFIXES):
            raise BadSampleError("empty_caption", "the caption has no character")
        raise BadSampleError(
            "missing_text", f"it has {_suffixes(raw)}, no .txt and no caption in a .json"
        )
    return captions


def read_caption(raw: RawSample, record: Mapping[str, Any], choice: CaptionChoice, key: int) -> str:
    """One caption.

    Args:
        raw: The sample.
        record: Its JSON.
        choice: Which caption.
        key: Seed of the draw.

    Raises:
        BadSampleError: As `captions_of`; also "extreme_caption": more than 8,000 characters.
    """
    if choice == "text":
        caption = (_text_lines(raw, record) or captions_of(raw, record))[0]
    else:
        caption = random.Random(key).choice(captions_of(raw, record))
    if len(caption) > MOST_CHARACTERS:
        raise BadSampleError("extreme_caption", f"{len(caption):,} characters")
    if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise BadSampleError("bad_encoding", "half a character, which no UTF-8 has")
    return caption


def caption_lines(text: str) -> list[str]:
    """Captions of a `.txt`; line breaks inside a caption are written as a backslash and an n."""
    lines = (_one_line(line.replace("\\n", " ")) for line in text.splitlines())
    return [line for line in lines if line]


def image_of(raw: RawSample, draft: int | None = None) -> Image.Image:
    """The decoded image in RGB; `draft` as in `read_image`.

    Raises:
        BadSampleError: "missing_image", "broken_image", or "extreme_image": more pixels than 64
            million, or one side more than 20 times the other.
    """
    image = _decoded(raw, partial(read_image, draft=draft))
    _require_sane(*image.size)
    return image


def check_image_of(raw: RawSample) -> None:
    """Fail where `image_of` fails, in a third of the time for a JPEG.

    Raises:
        BadSampleError: As `image_of`.
    """
    _require_sane(*_decoded(raw, check_image))


def _decoded(raw: RawSample, read: Callable[..., Result]) -> Result:
    data = next((raw[suffix] for suffix in IMAGE_SUFFIXES if suffix in raw), None)
    if data is None:
        raise BadSampleError("missing_image", f"it has {_suffixes(raw)}, no .jpg")
    try:
        return read(data, name=f"an image of {len(data):,} bytes", most_pixels=MOST_PIXELS)
    except ImageError as error:
        raise BadSampleError(error.cause, str(error)) from error


def _require_sane(width: int, height: int) -> None:
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise BadSampleError("extreme_image", f"{width} x {height} pixels")


def _text_lines(raw: RawSample, record: Mapping[str, Any]) -> list[str]:
    """Captions of the `.txt`: one in each line, unless the JSON says that all is one caption."""
    data = next((raw[suffix] for suffix in TEXT_SUFFIXES if suffix in raw), b"")
    try:
        text = str(data, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError("bad_encoding", str(error)) from error
    lines = caption_lines(text)
    whole = _one_line(text)
    return [whole] if len(lines) > 1 and _one_line(str(record.get("caption"))) == whole else lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _suffixes(raw: RawSample) -> str:
    return ", ".join(f".{suffix}" for suffix in raw if not suffix.startswith("__")) or "no file"
