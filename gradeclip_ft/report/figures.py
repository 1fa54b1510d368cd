"""Heat maps as pictures: 0-1 scale, colour map, overlay, PNG for the page.

The colour map is perceptually even and grows steadily in lightness, so it reads the same without
colour vision.
"""

from __future__ import annotations

import base64
from io import BytesIO
from typing import cast

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

COLOUR_MAP = "inferno"


def scale_heat(heat: Float[np.ndarray, "h w"], eps: float = 1e-6) -> Float[np.ndarray, "h w"]:
    """The map between its own minimum (0) and maximum (1); a constant map is 0 everywhere.

    Args:
        heat: Any scale.
        eps: Maps whose range is smaller, as a share of their largest value, count as constant.

    Raises:
        ValueError: A value is not finite.
    """
    if not np.isfinite(heat).all():
        raise ValueError("a heat map holds NaN or infinity; expected finite relevance")
    low, high = float(heat.min()), float(heat.max())
    if high - low <= eps * max(abs(low), abs(high)):
        return np.zeros(heat.shape, dtype=np.float32)
    return ((heat - low) / (high - low)).astype(np.float32)


def enlarge(heat: Float[np.ndarray, "h w"], size: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """Bilinear to (height, width), patch centres staying where they are."""
    height, width = size
    picture = Image.fromarray(np.ascontiguousarray(heat, dtype=np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def heat_png(heat: Float[np.ndarray, "h w"], side: int = 96) -> str:
    """Data URI of the coloured map; the palette index is the value times 255.

    Args:
        heat: Any scale.
        side: Pixels of the longer side.
    """
    factor = side / max(heat.shape)
    size = (max(1, round(heat.shape[0] * factor)), max(1, round(heat.shape[1] * factor)))
    index = np.rint(enlarge(scale_heat(heat), size) * 255).astype(np.uint8)
    picture = Image.fromarray(index).convert("P")
    picture.putpalette(colours().tobytes())
    return _data_uri(picture)


def image_png(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """Data URI of an image, lossless."""
    return _data_uri(Image.fromarray(image))


def colours() -> UInt8[np.ndarray, "256 3"]:
    """Red, green and blue of the colour map, from the least to the most relevant."""
    rgba = matplotlib.colormaps[COLOUR_MAP](np.arange(256), bytes=True)
    return np.ascontiguousarray(rgba[:, :3])


def overlay(
    image: UInt8[np.ndarray, "H W 3"], heat: Float[np.ndarray, "h w"], opacity: float = 0.6
) -> UInt8[np.ndarray, "H W 3"]:
    """The coloured map over the image, as the page shows it."""
    index = np.rint(enlarge(scale_heat(heat), image.shape[:2]) * 255).astype(np.uint8)
    mixed = (1 - opacity) * image + opacity * colours()[index]
    return cast("UInt8[np.ndarray, 'H W 3']", np.rint(mixed).astype(np.uint8))


def literal(text: str) -> str:
    """A text for a figure, without matplotlib's own meaning of a dollar."""
    return text.replace("$", r"\$")


def _data_uri(picture: Image.Image) -> str:
    buffer = BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
