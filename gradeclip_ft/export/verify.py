"""An export read back, by the library it is made for, is the model it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from gradeclip_ft.images import IMAGE_SUFFIXES, images_in, read_image
from gradeclip_ft.models.architecture import pair
from gradeclip_ft.models.clip import ImageTransform, LoadedClip
from gradeclip_ft.models.load import open_clip_config
from gradeclip_ft.ops.similarity import unit

# Largest difference of unit embeddings. fp32 on one machine gives 0, another library's kernels
# about 1e-7. fp16 rounds every weight by up to 2**-11 of it, which gives 1e-4 to 2e-4.
TOLERANCE = 1e-5
HALF_TOLERANCE = 2e-3
TEXTS = ("a photo of a red circle", "two people walk a small dog past the old station")
PHOTOS = 4
SHOWN = 5


class ExportError(RuntimeError):
    """An export that is not the model it was made from."""


@dataclass(frozen=True)
class Inputs:
    """What both models are shown.

    Attributes:
        pixels: At the size that other libraries build the model for.
        tokens: Of `TEXTS`.
    """

    pixels: Float[Tensor, "B 3 H W"]
    tokens: Tensor

    @classmethod
    def of(cls, loaded: LoadedClip, folder: Path | None = None) -> Inputs:
        """Photos of a folder, or drawn pictures, as this model gets them."""
        size = pair(open_clip_config(loaded)["model_cfg"]["vision_cfg"].get("image_size", 224))
        transform = ImageTransform(size=size, preprocessing=loaded.preprocessing)
        images = pictures() if folder is None else photos(folder)
        return cls(
            torch.stack([transform(image) for image in images]), loaded.tokenizer(list(TEXTS))
        )


def check_tensors(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], file: str) -> None:
    """Same keys, same types, same bits.

    Raises:
        ExportError: Names the first keys that differ.
    """
    problems = {
        "missing": [key for key in expected if key not in got],
        "unknown": [key for key in got if key not in expected],
        "changed": [
            key
            for key, value in expected.items()
            if key in got and not (got[key].dtype == value.dtype and torch.equal(got[key], value))
        ],
    }
    lines = [
        f"{len(keys)} {what}: {', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if lines:
        raise ExportError(
            f"{file} read back has other tensors than were written: {'; '.join(lines)}. The "
            "export is not kept; check the disk and the versions of the libraries"
        )


def check_embeddings(loaded: LoadedClip, other: Any, inputs: Inputs, *, half: bool) -> float:
    """Largest difference of the unit embeddings of a model and of its export.

    Raises:
        ExportError: It is above the tolerance: 1e-5, 2e-3 where `half` says fp16.
    """
    difference = largest_difference(loaded, other, inputs)
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    if not difference <= tolerance:
        raise ExportError(
            f"the export gives other embeddings than the model it was made from: they differ by "
            f"{difference:.2g}, at most {tolerance:.0e} is rounding. It is not kept"
        )
    return difference


@torch.no_grad()
def largest_difference(loaded: LoadedClip, other: Any, inputs: Inputs) -> float:
    """Largest difference of the unit embeddings of two models on pictures and texts."""
    embeddings = []
    for model in (loaded.clip.model, other):
        device, training = next(model.parameters()).device, model.training
        model.eval()
        image = model.encode_image(inputs.pixels.to(device))
        text = model.encode_text(inputs.tokens.to(device))
        model.train(training)
        embeddings.append((unit(image).cpu(), unit(text).cpu()))
    pairs = zip(*embeddings, strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def photos(folder: Path) -> list[Image.Image]:
    """The first four photos of a folder, by name.

    Raises:
        FileNotFoundError: There is none.
    """
    found = images_in(folder)[:PHOTOS]
    if not found:
        raise FileNotFoundError(
            f"no photo in pixels={folder}; give a folder of images ({', '.join(IMAGE_SUFFIXES)}), "
            "or leave it out for drawn pictures"
        )
    return [read_image(path) for path in found]


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
