"""An open_clip model seen through two towers, and everything that belongs to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.models.architecture import Architecture
from gradeclip_ft.models.image_model import ImageModel, LoadedImageModel
from gradeclip_ft.models.tokenizer import Tokenizer
from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError, packs
from gradeclip_ft.models.towers.select import BLOCKS, image_tower, text_tower
from gradeclip_ft.models.transform import Preprocessing
from gradeclip_ft.ops.similarity import unit

Item = TypeVar("Item")


class Clip(ImageModel):
    """An open_clip model, sole owner of the parameters, with an adapter per tower.

    Attributes:
        model: The open_clip module; its state dict is an open_clip checkpoint.
        image: Adapter of the image tower.
        text: Adapter of the text tower.
    """

    def __init__(self, model: Foreign) -> None:
        super().__init__(model, image_tower(model.visual))
        self.text = text_tower(model)

    @property
    def log_scale(self) -> Tensor:
        """Logarithm of the inverse temperature, a scalar."""
        scale: Tensor = self.model.logit_scale
        return scale.reshape(())

    def train(self, mode: bool = True) -> Clip:
        """Training mode, except where it would add noise and teach nothing.

        Batch norms keep their statistics, which small batches would spoil, and towers without a
        parameter to learn keep their dropout off.
        """
        super().train(mode)
        for part in self.model.modules():
            learning = [parameter.requires_grad for parameter in part.parameters()]
            frozen = bool(learning) and not any(learning)
            if frozen or isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self

    def encode_texts_of(
        self, batch: CaptionBatch
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "U D"]]:
        """Embeddings of the captions and of the distinct phrases, not normalised."""
        if batch.packed is None or not packs(self.text):
            captions = self.text.encode(batch.captions)
            if not len(batch.distinct):  # some towers refuse a call without texts
                return captions, captions[:0]  # in the graph: all processes gather gradients
            return captions, self.text.encode(batch.distinct)
        both = self.text.encode_packed(batch.packed)
        count = len(batch.captions)
        return both[:count], both[count:]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations of all blocks but the last again in the backward pass."""
        self.model.set_grad_checkpointing(enable)

    def compile_blocks(self, backend: str) -> None:
        """Compile the transformer blocks, all but what is explained, at their first use.

        Maps stay outside: the gradient inside a step goes through the last layer alone, and that is
        taken apart, not called.

        Args:
            backend: Of `torch.compile`, `inductor` for example.

        Raises:
            UnsupportedTowerError: The model has no such blocks.
        """
        blocks = [part for part in self.model.modules() if isinstance(part, BLOCKS)]
        if not blocks:
            raise UnsupportedTowerError(
                "there is no transformer block to compile in this model; leave optim.compile null"
            )
        for block in blocks:
            block.compile(backend=backend)


@dataclass(frozen=True)
class LoadedClip(LoadedImageModel):
    """A model with its tokenizer and preprocessing.

    Attributes:
        clip: The model.
        tokenizer: Texts to token ids.
        preprocessing: Pixel statistics and resizing of the model.
        image_size: (height, width) in pixels.
        architecture: What the model is made of.
        weights: Where its weights came from: a tag, a file, `random`; None for a model's own.
    """

    clip: Clip
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    image_size: tuple[int, int]
    architecture: Architecture
    weights: str | None = None

    @property
    def name(self) -> str:
        """Name of the architecture."""
        return self.architecture.name

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[Image.Image | str | Path], *, batch_size: int = 32
    ) -> Float[Tensor, "B D"]:
        """Unit embeddings of pictures, on the CPU, in fp32.

        Args:
            images: Pictures or their files.
            batch_size: Pictures at a time; bounds memory, not the result.

        Raises:
            FileNotFoundError: No such file.
        """
        parts = [
            unit(self.clip.image.encode(self.pixels(some))).cpu()
            for some in _chunks(list(images), batch_size)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Float[Tensor, "M D"]:
        """Unit embeddings of texts, on the CPU, in fp32.

        Args:
            texts: Sentences.
            batch_size: Texts at a time; bounds memory, not the result.
        """
        device = self.clip.log_scale.device
        parts = [
            unit(self.clip.text.encode(self.tokenizer(some, trim=True).to(device))).cpu()
            for some in _chunks(list(texts), batch_size)
        ]
        return torch.cat(parts)


def _chunks(items: list[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
