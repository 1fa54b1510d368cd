"""An export loaded again, by the library it is made for, gives the same embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.openclip import is_registered, open_file, open_folder
from gradeclip_ft.ops.similarity import unit

TOLERANCE = 1e-5  # largest difference of unit embeddings; fp32 on one machine gives about 1e-7
TEXTS = ("a photo of a red circle", "two people walk a small dog past the old station")


class ExportError(RuntimeError):
    """An export that does not give the embeddings of the model it was made from."""


def verify_openclip(loaded: LoadedClip, file: Path) -> float:
    """Load the export with `open_clip.create_model` and compare embeddings.

    Returns:
        Largest difference over the unit embeddings of two pictures and two texts.

    Raises:
        ExportError: If it is above 1e-5.
    """
    again = (
        open_file(loaded.name, file, loaded.image_size)
        if is_registered(loaded)
        else open_folder(file.parent)
    )
    difference = largest_difference(loaded, again)
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{file} gives other embeddings than the model it was made from: they differ by "
            f"{difference:.2g}, at most {TOLERANCE:.0e} is rounding. Do not use the file"
        )
    return difference


@torch.no_grad()
def largest_difference(loaded: LoadedClip, other: nn.Module) -> float:
    """Largest difference of the unit embeddings of two models on pictures and texts."""
    pixels = torch.stack([loaded.transform()(picture) for picture in pictures()])
    tokens = loaded.tokenizer(list(TEXTS))
    image, text = _embed(loaded.clip.model, pixels, tokens)
    image_again, text_again = _embed(other, pixels, tokens)
    return max(_distance(image, image_again), _distance(text, text_again))


def _embed(model: nn.Module, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings in evaluation mode, on the CPU; the mode is as before afterwards."""
    device, mode = next(model.parameters()).device, model.training
    model.eval()
    encode: Any = model
    image, text = encode.encode_image(pixels.to(device)), encode.encode_text(tokens.to(device))
    model.train(mode)
    return image.cpu(), text.cpu()


def pictures() -> Sequence[Image.Image]:
    """Two pictures with edges, gradients and texture, wider than high and the other way round."""
    rows, columns = np.mgrid[0:240, 0:360]
    gradient = np.stack([rows, columns, rows + columns], axis=-1) * 255 // 600
    disc = (rows - 100) ** 2 + (columns - 220) ** 2 < 60**2
    gradient[disc] = (220, 40, 30)
    gradient[rows // 12 % 2 == 0, 2] //= 2
    picture = gradient.astype(np.uint8)
    turned = np.ascontiguousarray(picture[:, ::-1].transpose(1, 0, 2))
    return [Image.fromarray(picture), Image.fromarray(turned)]


def _distance(a: Float[Tensor, "B D"], b: Float[Tensor, "B D"]) -> float:
    return float((unit(a) - unit(b)).abs().max())
