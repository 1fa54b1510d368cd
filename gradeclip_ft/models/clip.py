"""An open_clip model seen through two towers, and everything that belongs to it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from torch import Tensor, nn

from gradeclip_ft.models.tokenizer import Tokenizer
from gradeclip_ft.models.tower import Foreign, ImageTower, UnsupportedTowerError
from gradeclip_ft.models.towers.eva import EvaTower
from gradeclip_ft.models.towers.text import TextTower
from gradeclip_ft.models.towers.vit import VitTower
from gradeclip_ft.models.transform import ImageTransform, Preprocessing


class Clip(nn.Module):
    """An open_clip model, sole owner of the parameters, with an adapter per tower.

    Attributes:
        model: The open_clip module; its state dict is an open_clip checkpoint.
        image: Adapter of the image tower.
        text: Adapter of the text tower.
    """

    def __init__(self, model: Foreign) -> None:
        """Choose the adapters.

        Raises:
            UnsupportedTowerError: No adapter reproduces a tower exactly.
        """
        super().__init__()
        self.model: Foreign = model
        self.image = _image_tower(model.visual)
        self.text = TextTower(model if hasattr(model, "token_embedding") else model.text)

    @property
    def log_scale(self) -> Tensor:
        """Logarithm of the inverse temperature, a scalar."""
        scale: Tensor = self.model.logit_scale
        return scale.reshape(())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations of all blocks but the last again in the backward pass."""
        self.model.set_grad_checkpointing(enable)


@dataclass(frozen=True)
class LoadedClip:
    """A model with its tokenizer and preprocessing.

    Attributes:
        clip: The model.
        tokenizer: Texts to token ids.
        preprocessing: Pixel statistics and resizing of the model.
        image_size: (height, width) in pixels.
        name: Name of the architecture.
    """

    clip: Clip
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    image_size: tuple[int, int]
    name: str

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


def _image_tower(visual: Foreign) -> ImageTower:
    if isinstance(visual, VisionTransformer):
        return VitTower(visual)
    if isinstance(visual, TimmModel) and isinstance(visual.trunk, Eva):
        return EvaTower(visual)
    found = type(visual.trunk if isinstance(visual, TimmModel) else visual).__name__
    raise UnsupportedTowerError(
        f"image tower is {found}, expected open_clip's VisionTransformer or timm's Eva; choose "
        "ViT-B-16, ViT-L-14, EVA02-B-16 or EVA02-L-14-336, for example"
    )
