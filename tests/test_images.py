"""The one reader of pictures: what a file looks like, and what is refused and how."""

import io
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradeclip_ft.data.files import ImageSet, index_shards
from gradeclip_ft.data.samples import image_of
from gradeclip_ft.export.verify import photos
from gradeclip_ft.images import ImageError, check_image, images_in, peculiarity, read_image

RAMP = np.tile(np.linspace(0, 1, 256), (4, 1))


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.fixture
def photo() -> Image.Image:
    """96 x 64 pixels, blue, with a red top left corner."""
    picture = Image.new("RGB", (96, 64), (20, 20, 200))
    picture.paste((220, 20, 20), (0, 0, 24, 16))
    return picture


def turned(photo: Image.Image, orientation: int = 6) -> bytes:
    """6: to be turned clockwise by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo, "jpeg", exif=exif, quality=95)


def test_ordinary_files_keep_the_pixels_that_pil_and_open_clip_see(photo: Image.Image) -> None:
    noise = Image.effect_noise((50, 40), 80)
    for image in (photo, noise, noise.convert("1"), photo.convert("CMYK"), photo.quantize()):
        kind = "tiff" if image.mode == "CMYK" else "png"
        expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(read_image(encoded(image, kind)), expected), image.mode
    jpeg = encoded(photo, "jpeg")
    assert np.array_equal(read_image(jpeg), Image.open(io.BytesIO(jpeg)).convert("RGB"))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_pictures_are_turned_as_their_exif_says(photo: Image.Image, orientation: int) -> None:
    """Catches maps and training on a picture that lies on its side; PIL turns the oracle."""
    content = turned(photo, orientation)
    upright = read_image(content)
    ways = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
    way = Image.Transpose[ways.split()[orientation - 2]]
    stored = Image.open(io.BytesIO(content)).convert("RGB")
    assert np.array_equal(upright, stored.transpose(way))
    assert np.array_equal(read_image(content, exif=False), stored)
    assert peculiarity(content) == ["turned by EXIF"]
    assert peculiarity(encoded(photo, "jpeg")) == []


def test_a_draft_is_the_picture_at_half_its_size(photo: Image.Image) -> None:
    """Never below the pixels asked for, turned as the picture is, and of JPEGs alone."""
    smooth = photo.resize((8, 6)).resize((512, 384), Image.Resampling.BICUBIC)
    jpeg = turned(smooth, 6)
    whole, draft = read_image(jpeg), read_image(jpeg, draft=192)
    assert read_image(jpeg, draft=193).size == whole.size == (384, 512)
    assert read_image(encoded(smooth, "png"), draft=150).size == (512, 384)
    assert draft.size == (192, 256)
    expected = np.asarray(whole.resize(draft.size, Image.Resampling.BOX), dtype=float)
    # half a picture from half of every block's frequencies; rounding and chroma differ
    assert np.abs(np.asarray(draft, dtype=float) - expected).mean() < 2


def test_damaged_exif_does_not_cost_the_picture(photo: Image.Image) -> None:
    content = turned(photo).replace(b"Exif\0\0MM\0*", b"Exif\0\0XX\0\xff")
    assert read_image(content).size == (96, 64)


def test_transparent_parts_are_white() -> None:
    """PIL alone shows whatever colour hides behind alpha 0, mostly black."""
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0] * 256)
    palette.info["transparency"] = 0
    grey = Image.new("LA", (8, 8), (0, 0))
    for layer in (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), palette, grey):
        assert read_image(encoded(layer)).getpixel((3, 3)) == (255, 255, 255)
    opaque = Image.new("RGBA", (8, 8), (12, 34, 56, 255))
    assert read_image(opaque).getpixel((3, 3)) == (12, 34, 56)


@pytest.mark.parametrize(
    ("white", "kind"),
    [(65535, np.uint16), (4095, np.uint16), (1, np.float32), (255, np.float32), (65535, np.int32)],
)
def test_deep_pictures_keep_their_shades(white: int, kind: type) -> None:
    """PIL alone makes 16 bits white, floats black, and 12 bits stored in 16 nearly black."""
    content = encoded(Image.fromarray((RAMP * white).astype(kind)), "tiff")
    found = np.asarray(read_image(content))[0, :, 0].astype(int)
    assert np.abs(found - np.arange(256)).max() <= 1
    check_image(content)


def test_floats_that_are_not_numbers_are_black() -> None:
    ramp = RAMP.astype(np.float32)
    ramp[0] = np.nan
    ramp[1] = np.inf
    found = np.asarray(read_image(Image.fromarray(ramp)))[..., 0]
    assert found[:2].max() == 0
    assert found[2, 255] == 255


def test_every_part_of_the_program_sees_the_same_picture(tmp_path: Path) -> None:
    """Training, evaluation from files and from shards, explanation and export."""
    noise = Image.effect_noise((60, 40), 80)
    alpha = noise.convert("RGBA")
    alpha.putalpha(noise)
    deep = Image.fromarray(np.asarray(noise, np.uint16) * 251)
    for number, (content, suffix) in enumerate(
        [(turned(noise), "jpg"), (encoded(alpha), "png"), (encoded(deep), "png")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / f"0.{suffix}"
        path.write_bytes(content)
        shutil.make_archive(str(folder / "part"), "tar", folder, ".")
        (sample,) = index_shards([folder / "part.tar"])
        explained = np.asarray(read_image(path))
        for other in (
            image_of({suffix: content}),
            *(ImageSet([image], ["0"], [], labels=[0])[0][0] for image in (path, sample)),
            photos(folder)[0],
        ):
            assert np.array_equal(other, explained), suffix


def test_hidden_files_and_others_are_not_listed(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.tiff", "._a.jpg", ".a.png", "Thumbs.db", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in images_in(tmp_path)] == ["a.tiff", "b.JPG"]


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png_with(*chunks: bytes) -> bytes:
    content = encoded(Image.new("RGB", (40, 40)))
    return content[:33] + b"".join(chunks) + content[33:]  # after the header


BOMB = zlib.compress(bytes(50_000_000), 9)  # 50 kB
METADATA = {
    "zTXt": png_with(chunk(b"zTXt", b"Comment\0\0" + BOMB)),
    "iTXt": png_with(*[chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)] * 40),
    "iCCP": png_with(chunk(b"iCCP", b"icc\0\0" + BOMB)),
}


@pytest.mark.parametrize("kind", METADATA)
def test_packed_texts_and_profiles_are_not_unpacked_without_limit(kind: str) -> None:
    """Each would unpack to 50 MB, the second to 2 GB; the image itself is 40 x 40."""
    tracemalloc.start()
    try:
        read_image(METADATA[kind], name="a.png")
    except ImageError as error:
        assert str(error).startswith("a.png cannot be read as an image (")  # noqa: PT017
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def huge(width: int, height: int) -> bytes:
    """The pixels are not there at all."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n"
JPEG = encoded(Image.effect_noise((64, 64), 80), "jpeg")


@pytest.mark.parametrize("read", [read_image, check_image])
@pytest.mark.parametrize(
    ("content", "cause", "message"),
    [
        (huge(50_000, 50_000), "extreme_image", r"a.jpg: .* make it smaller first"),
        (EPS, "broken_image", "unknown format"),  # PIL would start Ghostscript
        (b"", "broken_image", "unknown format"),
        (JPEG[:10], "broken_image", "cannot be read as an image"),
        (JPEG[: len(JPEG) // 2], "broken_image", "truncated"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    read: object, content: bytes, cause: str, message: str, tmp_path: Path
) -> None:
    """One readable error with the file's name, the same from the reader and from the check."""
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as found:
        read(path)  # type: ignore[operator]
    assert found.value.cause == cause
    assert str(path) in str(found.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image .*a.jpg"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="cannot be read as an image"):
        read_image(tmp_path)
