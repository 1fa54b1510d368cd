"""One sample: which caption, and why a sample is left out."""

import io
import json
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
        ({}, "missing_text"),
        ({"jpg": b"", "json": b'{"caption": "a dog"}'}, "missing_text"),
        ({"txt": b"caf\xe9"}, "bad_encoding"),
        ({"txt": b" \n\t "}, "empty_caption"),
        ({"txt": b"\xef\xbb\xbf"}, "empty_caption"),
        ({"txt": b"a dog " * 1667}, "extreme_caption"),
    ],
)
def test_captions_that_cannot_be_used(raw: dict[str, bytes], expected: str) -> None:
    assert cause(read_caption, raw, {}, "text", 0) == expected


def test_a_caption_becomes_one_line() -> None:
    raw = {"txt": "\ufeff Café \n at\u00a0night\n".encode()}
    assert read_caption(raw, {}, "text", 0) == "Café at night"


def test_any_caption_is_drawn_by_the_seed_alone() -> None:
    record = {"captions": ["a dog", " ", 5, "a  cat", "a bird"]}
    raw = {"txt": b"a fish"}
    drawn = [read_caption(raw, record, "any", key) for key in range(60)]
    assert set(drawn) == {"a dog", "a cat", "a bird"}
    assert drawn == [read_caption(raw, record, "any", key) for key in range(60)]
    assert read_caption(raw, record, "text", 0) == "a fish"
    assert read_caption(raw, {"captions": "a dog"}, "any", 0) == "a fish"
    assert captions_of({}) == []


def test_half_a_character_from_json_is_refused() -> None:
    """JSON can spell it, UTF-8 and therefore every tokenizer cannot."""
    record = json.loads(r'{"captions": ["a \ud800 dog"]}')
    assert cause(read_caption, {"txt": b"a dog"}, record, "any", 0) == "bad_encoding"


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


def test_json_of_both_public_layouts_is_read() -> None:
    img2dataset = {"url": "u", "caption": "a dog", "key": "000000000", "exif": "{}", "sha256": "0"}
    assert read_record({"json": json.dumps(img2dataset).encode()}) == img2dataset
    assert read_record({}) == {}
