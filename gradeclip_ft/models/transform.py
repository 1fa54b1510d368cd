"""Picture to normalised pixels, as the model was trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F  # noqa: N812


@dataclass(frozen=True)
class Preprocessing:
    """Pixel statistics and resizing of a model.

    Attributes:
        mean: By channel, for values in [0, 1].
        std: By channel, for values in [0, 1].
        interpolation: Of the resize.
        resize: Bring the shortest side to size and crop, or squash both sides to size.
    """

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"


@dataclass(frozen=True)
class ImageTransform:
    """PIL image to pixels; a plain object, so it crosses process boundaries.

    Attributes:
        size: (height, width) of the result.
        preprocessing: Statistics and resizing of the model.
        train: Random instead of central crop. There is no flip: captions say left and right.
    """

    size: tuple[int, int]
    preprocessing: Preprocessing
    train: bool = False

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 H W"]:
        """Resize, crop, normalise."""
        pixels = self._crop(self._resize(image.convert("RGB")))
        planes = F.pil_to_tensor(pixels).contiguous()  # colours apart: three times faster below
        tensor = F.to_dtype(planes, torch.float32, scale=True)
        how = self.preprocessing
        result: Tensor = F.normalize(tensor, list(how.mean), list(how.std), inplace=True)
        return result

    def _resize(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        if self.preprocessing.resize == "shortest":
            # The longer side is cut to whole pixels as torchvision's Resize does.
            if height * image.width >= width * image.height:
                width = max(width, height * image.width // image.height)
            else:
                height = max(height, width * image.height // image.width)
        if (image.height, image.width) == (height, width):
            return image
        mode = InterpolationMode(self.preprocessing.interpolation)
        result: Image.Image = F.resize(image, [height, width], interpolation=mode, antialias=True)
        return result

    def _crop(self, image: Image.Image) -> Image.Image:
        spare = (image.height - self.size[0], image.width - self.size[1])
        if self.train:
            top, left = (int(torch.randint(room + 1, ())) for room in spare)
        else:
            top, left = (round(room / 2) for room in spare)
        if spare == (0, 0):
            return image
        return image.crop((left, top, left + self.size[1], top + self.size[0]))
