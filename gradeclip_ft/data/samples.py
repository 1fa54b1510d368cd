"""One raw sample: its caption, its image, and why it cannot be used if it cannot.

Layout of CC3M's shards, in both public forms: an image, a `.txt` with the caption, and a `.json`
that may hold more captions and phrases computed ahead.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from PIL import Image

from gradeclip_ft.data.shards import BadSampleError, RawSample, escaped, shard_name
from gradeclip_ft.images import IMAGE_SUFFIXES, ImageError, check_image, read_image

TEXT_SUFFIXES = ("txt", "text", "caption")
MOST_PIXELS = 64_000_000
MOST_ELONGATED = 20.0
MOST_CHARACTERS = 8000  # of a caption: more is no description of a photo

Result = TypeVar("Result")
CaptionChoice = Literal["text", "any"]
"""The caption in `.txt`, or at each visit any of the `captions` in `.json`."""


def sample_name(raw: RawSample) -> str:
    """Shard and key, for messages.

    >>> sample_name({"__url__": "data/cc3m-train-0004.tar", "__key__": "000041"})
    'cc3m-train-0004.tar:000041'
    """
    return f"{shard_name(raw['__url__'])}:{escaped(raw['__key__'])}"


def read_record(raw: RawSample) -> dict[str, Any]:
    """The sample's JSON; empty without one.

    Raises:
        BadSampleError: "broken_json".
    """
    if "json" not in raw:
        return {}
    try:
        record = json.loads(raw["json"])
    except (ValueError, RecursionError) as error:
        raise BadSampleError("broken_json", str(error)) from error
    if not isinstance(record, dict):
        raise BadSampleError("broken_json", f"it holds a {type(record).__name__}, not an object")
    return record


def read_caption(raw: RawSample, record: Mapping[str, Any], choice: CaptionChoice, key: int) -> str:
    """One caption, in one line.

    Args:
        raw: The sample.
        record: Its JSON; needed for `choice` "any" alone.
        choice: Which caption.
        key: Seed of the draw.

    Raises:
        BadSampleError: "missing_text", "bad_encoding", "empty_caption", or "extreme_caption": more
            than 8,000 characters.
    """
    several = captions_of(record) if choice == "any" else []
    text = random.Random(key).choice(several) if several else text_of(raw)
    if len(text) > MOST_CHARACTERS:
        raise BadSampleError("extreme_caption", f"{len(text):,} characters")
    caption = " ".join(text.split())
    if not caption:
        raise BadSampleError("empty_caption", "the caption has no character")
    if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise BadSampleError("bad_encoding", "half a character, which no UTF-8 has")
    return caption


def captions_of(record: Mapping[str, Any]) -> list[str]:
    """The captions listed in a sample's JSON, each in one line."""
    listed = record.get("captions")
    if not isinstance(listed, list):
        return []
    lines = [" ".join(entry.split()) for entry in listed if isinstance(entry, str)]
    return [line for line in lines if line]


def text_of(raw: RawSample) -> str:
    """The content of the caption file.

    Raises:
        BadSampleError: "missing_text" or "bad_encoding".
    """
    data = next((raw[suffix] for suffix in TEXT_SUFFIXES if suffix in raw), None)
    if data is None:
        raise BadSampleError("missing_text", f"it has {_suffixes(raw)}, no .txt")
    try:
        return str(data, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError("bad_encoding", str(error)) from error


def image_of(raw: RawSample) -> Image.Image:
    """The decoded image in RGB.

    Raises:
        BadSampleError: "missing_image", "broken_image", or "extreme_image": more pixels than 64
            million, or one side more than 20 times the other.
    """
    image = _decoded(raw, read_image)
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


def _suffixes(raw: RawSample) -> str:
    return ", ".join(f".{suffix}" for suffix in raw if not suffix.startswith("__")) or "no file"
