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

from gradeclip_ft.data.captions import CaptionTrainData
from gradeclip_ft.models.clip import ImageTransform, Preprocessing
from gradeclip_ft.models.tokenizer import Tokenizer, WordTokenizer

Files = dict[str, bytes]
"""Contents by suffix; the image first."""
WORDS = ("dog", "cat", "horse", "bird", "cow", "sheep", "car")
OTHER_WORDS = ("a", "black", "near", "house", "this", "is", "photo", "of", "the")
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


def source(place: str, **options: object) -> CaptionTrainData:
    """The loader of training with 8-pixel images and phrases by TextBlob."""
    settings = {"batch_size": 1, "resampled": False, "shuffle": 0, "workers": 0, **options}
    return CaptionTrainData(
        shards=place,
        tokenizer=Tokenizer(WordTokenizer((*OTHER_WORDS, *WORDS), 24), 24),
        transform=ImageTransform((8, 8), Preprocessing(), train=True),
        tagger="textblob",
        **settings,  # type: ignore[arg-type]
    )


def good(number: int) -> Files:
    """A sample with an image and a caption."""
    word = WORDS[number % len(WORDS)]
    return {"jpg": jpeg(number % 64), "txt": f"a black {word} near house {number}".encode()}


@cache
def jpeg(number: int, mode: str = "RGB") -> bytes:
    """A picture of 8 x 8 pixels; numbers differ in colour."""
    colour = (number * 37 % 256, number * 91 % 256, number * 13 % 256)
    image = Image.linear_gradient("L").resize((8, 8)).convert("RGB")
    image = Image.blend(image, Image.new("RGB", (8, 8), colour), 0.5).convert(mode)
    content = io.BytesIO()
    image.save(content, "jpeg")
    return content.getvalue()


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey PNG with further chunks after its header; a large one only claims its size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min((width + 1) * height, 10_000)))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]:
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    return content


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
BROKEN, EXTREME = {"broken_image": 1}, {"extreme_image": 1}
LOST_CAPTION = {"damaged_header": 1, "missing_text": 1}
DAMAGES = (
    Damage("HTML instead of a JPEG", lambda f: f | {"jpg": b"<html>404</html>"}, BROKEN),
    Damage("image of zero bytes", lambda f: f | {"jpg": b""}, BROKEN),
    Damage("JPEG cut in half", lambda f: f | {"jpg": f["jpg"][: len(f["jpg"]) // 2]}, BROKEN),
    Damage("100 megapixels", lambda f: f | {"jpg": png_of(10_000, 10_000)}, EXTREME),
    Damage(
        "decompression bomb, 2.5 gigapixels", lambda f: f | {"jpg": png_of(50_000, 50_000)}, EXTREME
    ),
    Damage("image of 2 x 2,000 pixels", lambda f: f | {"jpg": png_of(2, 2000)}, EXTREME),
    Damage("PostScript instead of a JPEG", lambda f: f | {"jpg": EPS}, BROKEN),
    Damage("no image", lambda f: {"txt": f["txt"]}, {"missing_image": 1}),
    Damage("no caption", lambda f: {"jpg": f["jpg"]}, {"missing_text": 1}),
    Damage("broken UTF-8", lambda f: f | {"txt": b"caf\xe9 au lait"}, {"bad_encoding": 1}),
    Damage("empty caption", lambda f: f | {"txt": b" \n"}, {"empty_caption": 1}),
    Damage(
        "caption of 10,000 characters",
        lambda f: f | {"txt": b"a dog and " * 1000},
        {"extreme_caption": 1},
    ),
    Damage("damaged tar header of the caption", dict, LOST_CAPTION, "txt"),
    Damage("CMYK image", lambda f: f | {"jpg": jpeg(1, "CMYK")}, {}, usable=True),
    Damage("one file twice", lambda f: f | {"TXT": b"other"}, {"duplicate_name": 1}, usable=True),
)


def pack(path: Path, samples: Iterable[tuple[str, Files, Damage | None]]) -> None:
    """Write a shard of (key, files of a good sample, what happens to them)."""
    with path.open("wb") as out:
        for key, files, damage in samples:
            broken = damage.break_(files) if damage else files
            for suffix, content in broken.items():
                header = bytearray(tar_header(f"{key}.{suffix}", len(content)))
                if damage and suffix == damage.header:
                    header[3] ^= 0xFF
                out.write(header + content + bytes(-len(content) % BLOCK))
        out.write(bytes(2 * BLOCK))


def tar_header(name: str, size: int) -> bytes:
    """Of a regular file."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry.tobuf(tarfile.GNU_FORMAT)
