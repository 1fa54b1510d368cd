"""What every model with an image tower has in common: a CLIP, BLIP, or a classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from gradeclip_ft.models.picture import open_picture
from gradeclip_ft.models.tower import Foreign, ImageTower
from gradeclip_ft.models.transform import ImageTransform, Preprocessing


class ImageModel(nn.Module):
    """A library's model, sole owner of the parameters, with an adapter of its image tower.

    Attributes:
        model: The library's module.
        image: Adapter of the image tower.
    """

    def __init__(self, model: Foreign, image: ImageTower) -> None:
        super().__init__()
        self.model: Foreign = model
        self.image = image

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule gets its own mode back."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


class LoadedImageModel:
    """How pictures become the pixels of a model, and what names it.

    Attributes:
        clip: The model.
        preprocessing: Pixel statistics and resizing of the model.
        image_size: (height, width) in pixels.
    """

    clip: ImageModel
    preprocessing: Preprocessing
    image_size: tuple[int, int]

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of the pixels by channel, for values in [0, 1]."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of the pixels by channel, for values in [0, 1]."""
        return self.preprocessing.std

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return self.clip.image.patch

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the current parameters and buffers, independent of any file format."""
        digest = hashlib.sha256()
        for key, value in sorted(self.clip.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def transform(self, train: bool = False, size: int | None = None) -> ImageTransform:
        """Picture to normalised pixels; for training a random crop, never a flip.

        Args:
            train: Random instead of central crop.
            size: Side in pixels where it is not the model's.
        """
        target = self.image_size if size is None else (size, size)
        return ImageTransform(size=target, preprocessing=self.preprocessing, train=train)

    def pixels(self, images: Sequence[Image.Image | str | Path]) -> Float[Tensor, "B 3 H W"]:
        """Pictures, or their files, as the model takes them, on its device.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A file is no picture.
        """
        transform = self.transform()
        stacked = torch.stack([transform(open_picture(image)) for image in images])
        return stacked.to(self.clip.device)
