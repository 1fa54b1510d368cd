"""The one reader of pictures: for training, evaluation, explanation and export.

All of them must see the same pixels of the same file, whatever its format, orientation, colour
mode and depth. Annotations in pixels are the one exception; see `exif` below.

open_clip's transform sees the same RGB and grey pictures. Others it resizes before it converts
them: palettes by nearest neighbour, and with alpha it shows the colour of transparent parts.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is accepted, whatever a file is called. PIL knows more, and some of them start programs:
an EPS file runs Ghostscript."""

IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "png", "webp"),  # in this order where a sample has several
    *("jfif", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "pgm"),
)
"""Of files of those formats, in lower case and without the dot."""

MOST_PIXELS = 178_956_970
"""PIL's own limit against decompression bombs: half a gigabyte of pixels."""

DEEP = ("I", "F")
"""How PIL's names of modes of more than 8 bits begin: I, I;16, F and others."""

Source = Image.Image | Path | str | bytes


class ImageError(ValueError):
    """A picture that cannot be read; the message names it.

    Attributes:
        cause: "broken_image", or "extreme_image" for one with too many pixels.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def read_image(
    source: Source,
    *,
    name: object = None,
    exif: bool = True,
    most_pixels: int = MOST_PIXELS,
    draft: int | None = None,
) -> Image.Image:
    """RGB pixels as a viewer shows them: upright, transparent parts white, 16 bits scaled to 8.

    Args:
        source: A file, its content, or a picture of any mode (palette, CMYK, grey, float, alpha).
        name: What messages call it; by default the file's path.
        exif: Turn the picture as its EXIF says. COCO's boxes and masks are about the pixels as
            stored, so readers of its annotations say False.
        most_pixels: More are refused before anything is decoded.
        draft: Decode a JPEG at a half, quarter or eighth of its size where both sides keep at least
            so many pixels. Others are decoded in full, as all are without it.

    Raises:
        FileNotFoundError: No such file.
        ImageError: It is not a complete image of an accepted format, or it is too large.
    """
    with _opened(source, name, most_pixels) as image:
        if draft is not None:
            image.draft(None, (draft, draft))
        image.load()
        return _rgb(ImageOps.exif_transpose(image) if exif and _is_turned(image) else image)


def check_image(
    source: Source, *, name: object = None, most_pixels: int = MOST_PIXELS
) -> tuple[int, int]:
    """Width and height as stored; fails where `read_image` fails, at a third of its time for JPEG.

    Raises:
        FileNotFoundError: No such file.
        ImageError: As `read_image`.
    """
    with _opened(source, name, most_pixels) as image:
        size = image.size
        image.draft(None, (1, 1))  # decode as coarsely as the format allows
        image.load()
        return size


def peculiarity(source: Source) -> list[str]:
    """Why other programs may show the picture differently; empty for most pictures.

    Raises:
        FileNotFoundError: No such file.
        ImageError: It is not an image of an accepted format.
    """
    with _opened(source, None, MOST_PIXELS) as image:
        found = {
            "turned by EXIF": _is_turned(image),
            "transparent": _has_alpha(image),
            "more than 8 bits": image.mode.startswith(DEEP),
        }
    return [what for what, is_so in found.items() if is_so]


def images_in(folder: Path, *, below: bool = False) -> list[Path]:
    """Image files of a folder by their suffix, sorted by name, without hidden ones (`._0.jpg`).

    With `below` also those of its folders.
    """
    return sorted(
        path
        for path in folder.glob("**/*" if below else "*")
        if path.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES and path.name[0] != "."
    )


@contextmanager
def _opened(source: Source, name: object, most_pixels: int) -> Iterator[Image.Image]:
    """The picture, not decoded yet; every failure inside becomes one readable error."""
    if name is None:
        name = source if isinstance(source, str | Path) else "the picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities of formats; the pixel limit is ours
            if isinstance(source, Image.Image):
                yield source
                return
            content = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(content, formats=_formats()) as image:
                if image.width * image.height > most_pixels:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                yield image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image {name}") from error
    except Image.DecompressionBombError as error:
        raise ImageError("extreme_image", f"{name}: {error}; make it smaller first") from error
    except ImageError:
        raise
    except Exception as error:  # decoders of broken data raise anything, down to struct.error
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else f"{kind}{error}"
        raise ImageError(
            "broken_image",
            f"{name} cannot be read as an image ({reason}); expected a complete JPEG, PNG, WebP, "
            "GIF, BMP, TIFF, AVIF, JPEG 2000 or PPM without megabytes of metadata",
        ) from error


@cache
def _formats() -> list[str]:
    """Those that this build of PIL has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # EXIF that cannot be read turns nothing; the pixels are good
        return False


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(DEEP):
        image = _in_eight_bits(image)
    if _has_alpha(image):
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, or of floats, which PIL would cut off at 255.

    Files rarely say which value is white, so it is the smallest usual range that holds all values:
    12 bits in a file of 16 are as bright as in one of 12. Beyond 16 bits the maximum is white.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    peak = values.max(initial=0.0)
    usual = (255.0, 4095.0, 65535.0)
    if image.mode == "F" and peak < 2:  # from 0 to 1, with a little overshoot
        white = 1.0
    else:
        white = next((bound for bound in usual if peak <= bound), peak)
    return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
