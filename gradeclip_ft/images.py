"""Any picture a user may hand in, as upright RGB."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def open_picture(source: Image.Image | str | Path) -> Image.Image:
    """RGB as a viewer shows it: turned as its EXIF says, transparent parts white.

    Args:
        source: A picture of any mode (palette, CMYK, grey of 8 or 16 bits, alpha), or its file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no complete picture, or has too many pixels to be opened safely.
    """
    if isinstance(source, Image.Image):
        return _plain(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at half the limit
            with Image.open(source) as picture:
                return _plain(picture)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no picture {source}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{source}: {error}; make it smaller first") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{source} cannot be read as a picture ({error}); expected a complete JPEG, PNG, WebP, "
            "BMP or TIFF"
        ) from error


def _plain(picture: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):  # 16 bits or more: to 8, where PIL would cut off
        values = np.asarray(upright, dtype=np.float64)
        scale = 257 if values.max(initial=0) > 255 else 1
        upright = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    if "transparency" in upright.info or upright.mode in ("RGBA", "LA", "PA"):
        layer = upright.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return upright.convert("RGB")
