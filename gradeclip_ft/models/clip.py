"""What every model with an image tower has in common: a CLIP, BLIP, or a classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F  # noqa: N812

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.images import read_image
from gradeclip_ft.models.architecture import Architecture
from gradeclip_ft.models.tokenizer import Tokenizer
from gradeclip_ft.models.tower import ImageTower, Tower, packs
from gradeclip_ft.models.towers.select import BLOCKS, image_tower, text_tower
from gradeclip_ft.models.trace import Foreign, UnsupportedTowerError
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.text.prompts import fill


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
        stacked = torch.stack([transform(read_image(image)) for image in images])
        return stacked.to(self.clip.device)


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


@torch.no_grad()
def class_embeddings(
    clip: Clip,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    say: Callable[[str, str], str] = fill,
    batch_size: int = 256,
) -> Float[Tensor, "K D"]:
    """Unit class embeddings in fp32: embed, normalise, mean over templates, normalise.

    Args:
        clip: The model; the mode of its layers is the caller's business.
        tokenizer: Of that model.
        names: Class names as the annotation file has them.
        templates: Sentences with `{}` for the name and `{a}` for its article.
        say: Template and name to sentence; ViLD's rules unless told otherwise.
        batch_size: Sentences encoded at a time; bounds memory, not the result.

    Raises:
        ValueError: No name or no template.
    """
    if not names or not templates:
        raise ValueError(f"got {len(names)} names and {len(templates)} templates, expected some")
    device = clip.log_scale.device
    sentences = [say(template, name) for name in names for template in templates]
    parts = [
        unit(
            clip.text.encode(tokenizer(sentences[start : start + batch_size], trim=True).to(device))
        )
        for start in range(0, len(sentences), batch_size)
    ]
    by_class = torch.cat(parts).view(len(names), len(templates), -1)  # (K, T, D)
    return unit(by_class.mean(1))


def image_sentence(loaded: LoadedClip) -> str:
    """Blocks, heads, grid and pooling of the image tower, and whether it can be explained."""
    tower, (height, width) = loaded.clip.image, loaded.image_size
    if tower.unexplained is not None:
        return f"encodes only, no heat maps and no dense features: {tower.unexplained}"
    sides = f"patch {tower.patch}, grid {height // tower.patch} x {width // tower.patch}"
    visual = getattr(loaded.clip.model, "visual", loaded.clip.model)
    kind, trunk = type(visual).__name__, getattr(visual, "trunk", None)
    what = kind if trunk is None else f"{kind} around timm's {type(trunk).__name__}"
    return f"{what}: {_parts(tower)}, {sides}; maps and dense features at any multiple of the patch"


def text_sentence(loaded: LoadedClip) -> str:
    """Blocks, heads, context and pooling of the text tower, and whether it can be explained."""
    tower = loaded.clip.text
    cut = "padding is cut off" if tower.cuts_exactly else "always at full length"
    length = f"context {loaded.tokenizer.context_length}, {cut}"
    if tower.unexplained is not None:
        return f"encodes only, no words explained: {tower.unexplained}; {length}"
    return f"{_parts(tower)}, {length}; words can be explained"


def _parts(tower: Tower) -> str:
    return (
        f"{tower.depth} blocks of width {tower.width}, embedding from the {tower.pooling}, "
        f"{tower.heads} heads there"
    )
