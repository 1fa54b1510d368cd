"""Samples as the world delivers them: good ones, and one kind of damage after the other.

Each kind names the counts that reading it must give, so that a test can ask for exact numbers.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

Files = dict[str, bytes]
"""Contents by suffix; the image first."""
WORDS = ("dog", "cat", "horse", "bird", "cow", "sheep", "car")
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Damage:
    """One kind of broken sample.

    Attributes:
        name: For people.
        break_: Files of a good sample to those of a broken one.
        causes: What the reader counts for it.
        header: Suffix of the file whose tar header is damaged as well.
        usable: Whether the sample survives.
    """

    name: str
    break_: Callable[[Files], Files]
    causes: Mapping[str, int]
    header: str | None = None
    usable: bool = False


def good(number: int, *, side: int = 8) -> Files:
    """A sample with an image and a caption."""
    word = WORDS[number % len(WORDS)]
    return {"jpg": jpeg(number % 64, side), "txt": f"a black {word} near house {number}".encode()}


@cache
def jpeg(number: int, side: int, mode: str = "RGB") -> bytes:
    """A small picture; numbers differ in colour."""
    colour = (number * 37 % 256, number * 91 % 256, number * 13 % 256)
    image = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    image = Image.blend(image, Image.new("RGB", (side, side), colour), 0.5).convert(mode)
    content = io.BytesIO()
    image.save(content, "jpeg")
    return content.getvalue()


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bool = True) -> bytes:
    """A grey PNG with further chunks behind its header; without pixels it only claims its size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 1) * height if pixels else 1))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def _image(content: Callable[[], bytes]) -> Callable[[Files], Files]:
    return lambda files: {**files, "jpg": content()}


def _text(content: bytes) -> Callable[[Files], Files]:
    return lambda files: {**files, "txt": content}


def _without(suffix: str) -> Callable[[Files], Files]:
    return lambda files: {name: data for name, data in files.items() if name != suffix}


BROKEN = {"broken_image": 1}
EXTREME = {"extreme_image": 1}
DAMAGES = (
    Damage("HTML instead of a JPEG", _image(lambda: b"<html>404</html>"), BROKEN),
    Damage("image of zero bytes", _image(lambda: b""), BROKEN),
    Damage("JPEG cut in half", lambda f: {**f, "jpg": f["jpg"][: len(f["jpg"]) // 2]}, BROKEN),
    Damage("100 megapixels", _image(lambda: png_of(10_000, 10_000, pixels=False)), EXTREME),
    Damage(
        "decompression bomb, 2.5 gigapixels",
        _image(lambda: png_of(50_000, 50_000, pixels=False)),
        EXTREME,
    ),
    Damage("image of 2 x 2,000 pixels", _image(lambda: png_of(2, 2000)), EXTREME),
    Damage(
        "PostScript instead of a JPEG",
        _image(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        BROKEN,
    ),
    Damage("no image", _without("jpg"), {"missing_image": 1}),
    Damage("no caption", _without("txt"), {"missing_text": 1}),
    Damage("broken UTF-8", _text(b"caf\xe9 au lait"), {"bad_encoding": 1}),
    Damage("empty caption", _text(b" \n"), {"empty_caption": 1}),
    Damage("caption of 10,000 characters", _text(b"a dog and " * 1000), {"extreme_caption": 1}),
    Damage(
        "damaged tar header of the caption", dict, {"damaged_header": 1, "missing_text": 1}, "txt"
    ),
    Damage("CMYK image", _image(lambda: jpeg(1, 8, "CMYK")), {}, usable=True),
    Damage(
        "one file twice", lambda f: {**f, "TXT": b"another"}, {"duplicate_name": 1}, usable=True
    ),
)


def pack(path: Path, samples: Iterable[tuple[str, Files, str | None]]) -> None:
    """Write a shard of (key, files, suffix of the file whose header is damaged)."""
    with path.open("wb") as out:
        for key, files, damaged in samples:
            for suffix, content in files.items():
                header = bytearray(tar_header(f"{key}.{suffix}", len(content)))
                if suffix == damaged:
                    header[3] ^= 0xFF
                out.write(header + content + bytes(-len(content) % BLOCK))
        out.write(bytes(2 * BLOCK))


def tar_header(name: str, size: int) -> bytes:
    """Of a regular file."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry.tobuf(tarfile.GNU_FORMAT)
