"""One sample: which caption, and why a sample is left out."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from gradeclip_ft.data.samples import (
    captions_of,
    check_image_of,
    image_of,
    read_caption,
    read_record,
)
from gradeclip_ft.data.shards import BadSampleError
from gradeclip_ft.images import IMAGE_SUFFIXES


def cause(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(BadSampleError) as error:
        function(*arguments, **options)
    return str(error.value.args[0])


def picture(width: int, height: int, kind: str = "png", mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.new(mode, (width, height)).save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"jpg": b"", "json": b'{"url": "u", "captions": "a dog"}'}, "missing_text"),
        ({"txt": b" \n\t "}, "empty_caption"),
        ({"txt": b"\xef\xbb\xbf"}, "empty_caption"),
        # JSON can spell half a character, UTF-8 and therefore every tokenizer cannot
        ({"json": rb'{"captions": ["a \ud800 dog"]}'}, "bad_encoding"),
    ],
)
def test_captions_that_cannot_be_used(raw: dict[str, bytes], expected: str) -> None:
    for choice in ("text", "any"):
        assert cause(read_caption, raw, read_record(raw), choice, 0) == expected


LINES = b"a dog\n\n a  cat \r\na bird"


@pytest.mark.parametrize(
    ("raw", "first", "every"),
    [
        ({"txt": "\ufeff Caf\u00e9 \u00a0at night".encode()}, "Caf\u00e9 at night", None),
        (
            {"txt": b"a fish", "json": b'{"captions": ["a dog", " ", 5, "a  cat"]}'},
            "a fish",
            ["a dog", "a cat"],
        ),
        ({"txt": b"a fish", "json": b'{"captions": "a dog"}'}, "a fish", None),
        ({"txt": LINES}, "a dog", ["a dog", "a cat", "a bird"]),  # CLIP_benchmark's layout
        ({"txt": rb"a dog\non a mat"}, "a dog on a mat", None),  # its line break in a caption
        # img2dataset's: the page's text had line breaks, and the JSON says that it is one caption
        (
            {"txt": LINES, "json": b'{"caption": "a dog a cat\\na bird"}'},
            "a dog a cat a bird",
            None,
        ),
        ({"json": b'{"caption": " a  dog"}'}, "a dog", None),
        ({"json": b'{"captions": ["a dog", "a cat"]}'}, "a dog", ["a dog", "a cat"]),
    ],
)
def test_captions_of_every_layout(
    raw: dict[str, bytes], first: str, every: list[str] | None
) -> None:
    """Several captions in one .txt were joined to one; a .json alone was a missing caption."""
    record = read_record(raw)
    assert read_caption(raw, record, "text", 0) == first
    assert captions_of(raw, record) == (every or [first])
    drawn = [read_caption(raw, record, "any", key) for key in range(40)]
    assert set(drawn) == set(every or [first])
    assert drawn == [read_caption(raw, record, "any", key) for key in range(40)]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 200_000])
def test_broken_json_is_named(content: bytes) -> None:
    assert cause(read_record, {"json": content}) == "broken_json"


@pytest.mark.parametrize("read", [image_of, check_image_of])
@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"txt": b"a dog"}, "missing_image"),
        ({"jpg": b""}, "broken_image"),
        ({"jpg": b"<html>"}, "broken_image"),
        ({"jpg": picture(40, 40, "jpeg")[:-30]}, "broken_image"),
        ({"png": picture(40, 40)[:-30]}, "broken_image"),
        ({"png": picture(9000, 9000, mode="1")}, "extreme_image"),  # 81 million pixels
        ({"png": picture(2100, 100)}, "extreme_image"),
    ],
)
def test_images_that_cannot_be_used(
    raw: dict[str, bytes], expected: str, read: Callable[..., object]
) -> None:
    """A resumed epoch only checks what comes before; it must drop the same samples."""
    assert cause(read, raw) == expected


def test_check_and_decoding_agree_wherever_a_jpeg_breaks(jpeg: Callable[[int], bytes]) -> None:
    content = bytearray(jpeg(3))
    for place in range(2, len(content), 7):
        damaged = content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        outcomes = []
        for read in (image_of, check_image_of):
            try:
                read({"jpg": bytes(damaged)})
                outcomes.append("")
            except BadSampleError as error:
                outcomes.append(str(error.args[0]))
        assert outcomes[0] == outcomes[1], place


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_documented_format_is_read(suffix: str) -> None:
    """A sample with a .gif or a .bmp was dropped as one without an image."""
    names = {"jpg": "jpeg", "jfif": "jpeg", "tif": "tiff", "jp2": "jpeg2000", "pgm": "ppm"}
    content = picture(30, 20, names.get(suffix, suffix))
    assert image_of({suffix: content}).size == (30, 20)
