"""A CLIP seen through its two towers, with its tokenizer and pixels: what the package works on.

BLIP and classifiers are beside it in `models/other`. They can be explained, BLIP can also be
evaluated; neither can be trained or exported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped, UInt8
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F  # noqa: N812

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.images import read_image
from gradeclip_ft.models.architecture import Architecture
from gradeclip_ft.models.tokenizer import Tokenizer
from gradeclip_ft.models.tower import Tower
from gradeclip_ft.models.towers.select import BLOCKS, image_tower, text_tower
from gradeclip_ft.models.trace import Foreign, UnsupportedTowerError
from gradeclip_ft.ops.heatmap import at_points
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.text.prompts import fill

# In the order of the sorted WordNet ids, which name the folders of the images.
IMAGENET_NAMES: list[str] = IMAGENET_CLASSNAMES
IMAGENET_TEMPLATES = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def imagenet_wnids() -> list[str]:
    """WordNet ids of ImageNet's classes, in the order of `IMAGENET_NAMES`."""
    names: list[str] = ImageNetInfo().label_names()  # type: ignore[no-untyped-call]
    return names


@dataclass(frozen=True)
class Preprocessing:
    """Pixel statistics and resizing of a model.

    Attributes:
        mean: By channel, for values in [0, 1].
        std: By channel, for values in [0, 1].
        interpolation: Of the resize.
        resize: Bring the shortest side to size and crop; bring the longest to size and pad with
            black; or squash both sides to size.
    """

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "longest", "squash"] = "shortest"

    @classmethod
    def of(cls, how: Mapping[str, Any]) -> Preprocessing:
        """A `preprocess_cfg` of open_clip; CLIP's own where it says nothing."""
        mean, std = how.get("mean") or cls.mean, how.get("std") or cls.std
        resize: Any = how.get("resize_mode") or "shortest"
        if resize not in ("shortest", "longest", "squash"):
            raise ValueError(f"resize_mode is {resize!r}, expected shortest, longest or squash")
        if how.get("fill_color"):
            raise ValueError(
                f"fill_color is {how['fill_color']}, expected 0: padding is black here"
            )
        return cls(
            mean=(float(mean[0]), float(mean[1]), float(mean[2])),
            std=(float(std[0]), float(std[1]), float(std[2])),
            interpolation=how.get("interpolation") or "bicubic",
            resize=resize,
        )

    def normalise(self, pixels: UInt8[Tensor, "*B 3 H W"]) -> Float[Tensor, "*B 3 H W"]:
        """Colours of 8 bits as the model takes them, on their own device."""
        tensor = F.to_dtype(pixels, torch.float32, scale=True)
        result: Tensor = F.normalize(tensor, list(self.mean), list(self.std), inplace=True)
        return result


@dataclass(frozen=True)
class Placement:
    """Where the pixels of a model lie on the photo that they were made from.

    A point x pixels from the left edge of the photo is x · scale + offset pixels from theirs; the
    same from above.

    Attributes:
        photo: (height, width) of the photo.
        size: (height, width) of the model's pixels.
        scale: (vertical, horizontal).
        offset: (vertical, horizontal); negative where something was cut off, positive where padded.
    """

    photo: tuple[int, int]
    size: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[int, int] = (0, 0)

    def on_photo(self, heat: Float[Tensor, "P h w"]) -> Float[Tensor, "P H W"]:
        """Maps at the size of the photo, bilinear; NaN where the photo was cut off.

        Args:
            heat: On any grid that covers the model's pixels, such as that of the patches.
        """
        y, x = (
            ((torch.arange(count) + 0.5) * scale + offset) / size
            for count, scale, offset, size in zip(
                self.photo, self.scale, self.offset, self.size, strict=True
            )
        )
        return at_points(heat, y, x)


@dataclass(frozen=True)
class ImageTransform:
    """PIL image to pixels; a plain object, so it crosses process boundaries.

    For training the crop is random, without a flip: captions say left and right. `size` is
    (height, width). Without `normalised` pixels stay colours of 8 bits, a quarter as long on
    their way to whoever normalises them.
    """

    size: tuple[int, int]
    preprocessing: Preprocessing
    train: bool = False
    normalised: bool = True

    def __call__(self, image: Image.Image) -> Shaped[Tensor, "3 H W"]:
        """Resize, crop, normalise."""
        pixels = self._crop(self._resize(image.convert("RGB")))
        # Colours apart: three times faster.
        planes = F.pil_to_tensor(pixels).contiguous()
        return self.preprocessing.normalise(planes) if self.normalised else planes

    def of_bytes(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 h w"]:
        """The same of many pictures of one size, on their device, never for training.

        Resizing is that of torch, whose bytes differ from PIL's by rounding.
        """
        before = (images.shape[2], images.shape[3])
        resized = self._resized(before)
        if resized != before:
            mode = InterpolationMode(self.preprocessing.interpolation)
            images = F.resize(images, list(resized), interpolation=mode, antialias=True)
        return self.preprocessing.normalise(F.crop(images, *self._corner(resized), *self.size))

    def stack(self, images: Sequence[Image.Image | str | Path]) -> Float[Tensor, "B 3 H W"]:
        """Pixels of pictures or their files.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A file is not a picture.
        """
        return torch.stack([self(read_image(image)) for image in images])

    def placement(self, image: Image.Image) -> Placement:
        """Where the pixels of an image come from, without the random crop of training."""
        photo = (image.height, image.width)
        resized = self._resized(photo)
        top, left = self._corner(resized)
        scale = (resized[0] / photo[0], resized[1] / photo[1])
        return Placement(photo, self.size, scale, (-top, -left))

    def _resized(self, photo: tuple[int, int]) -> tuple[int, int]:
        """(height, width) before cropping and padding."""
        height, width = self.size
        resize = self.preprocessing.resize
        if resize == "shortest" and height == width:
            # The longer side is cut to whole pixels as torchvision's Resize does.
            if photo[1] >= photo[0]:
                width = height * photo[1] // photo[0]
            else:
                height = width * photo[0] // photo[1]
        elif resize != "squash":  # rounded as open_clip's ResizeKeepRatio does
            ratio = (max if resize == "longest" else min)(photo[0] / height, photo[1] / width)
            height, width = (max(1, round(s / ratio)) for s in photo)
        return height, width

    def _resize(self, image: Image.Image) -> Image.Image:
        height, width = self._resized((image.height, image.width))
        if (image.height, image.width) == (height, width):
            return image
        mode = InterpolationMode(self.preprocessing.interpolation)
        result: Image.Image = F.resize(image, [height, width], interpolation=mode, antialias=True)
        return result

    def _corner(self, resized: tuple[int, int]) -> tuple[int, int]:
        """(top, left) of the central crop; negative where there is padding."""
        spare = (resized[0] - self.size[0], resized[1] - self.size[1])
        top, left = (round(room / 2) if room > 0 else -(-room // 2) for room in spare)
        return top, left

    def _crop(self, image: Image.Image) -> Image.Image:
        resized = (image.height, image.width)
        top, left = self._corner(resized)
        if self.train:  # where there is padding, it is as it is
            rooms = (resized[0] - self.size[0], resized[1] - self.size[1])
            top, left = (
                int(torch.randint(room + 1, ())) if room >= 0 else centre
                for room, centre in zip(rooms, (top, left), strict=True)
            )
        if resized == self.size:
            return image
        return image.crop((left, top, left + self.size[1], top + self.size[0]))


@contextmanager
def evaluation_mode(module: Foreign) -> Iterator[None]:
    """Evaluation mode for a while; every submodule gets its own mode back."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


@runtime_checkable
class ImageTextModel(Protocol):
    """What evaluating and explaining take, a torch module: a Clip, a Blip, or a detector."""

    image: Tower
    text: Tower

    @property
    def model(self) -> Foreign:
        """The module whose state dict is saved and hashed: the library's, or a whole detector."""
        ...

    def to(self, *where: Any) -> Any:
        """Move or cast all parameters."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""

    @property
    def log_scale(self) -> Tensor:
        """Logarithm of the inverse temperature, a scalar."""


class Clip(nn.Module):
    """An open_clip model, sole owner of the parameters, with an adapter per tower.

    The state dict of `model` is an open_clip checkpoint.
    """

    def __init__(self, model: Foreign) -> None:
        super().__init__()
        self.model: Foreign = model
        self.image = image_tower(model.visual)
        self.text = text_tower(model)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

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
        if batch.packed is None or self.text.encode_packed is None:
            captions = self.text.encode(batch.captions)
            if not len(batch.distinct):  # some towers refuse a call without texts
                return captions, captions[:0]  # in the graph: all processes gather gradients
            return captions, self.text.encode(batch.distinct)
        both = self.text.encode_packed(batch.packed)  # one call: the prompt is computed once
        count = len(batch.captions)
        return both[:count], both[count:]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations of all blocks but the last again in the backward pass."""
        self.model.set_grad_checkpointing(enable)

    def compile_blocks(self, backend: str) -> None:
        """Compile the transformer blocks, all but what is explained, at their first use.

        Maps stay outside: the gradient inside a step goes through the last layer alone, and that is
        taken apart, not called. Compiling the parts of that layer made a Grad-ECLIP step slower.

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
class LoadedClip:
    """A model of images and texts with its tokenizer and preprocessing.

    Attributes:
        image_size: (height, width) in pixels.
        weights: Where its weights came from: a tag, a file, `random`; None for a model's own.
        activation_unknown: Whether they may have been trained with another activation.
    """

    clip: ImageTextModel
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    image_size: tuple[int, int]
    architecture: Architecture
    weights: str | None = None
    activation_unknown: bool = False

    def require_clip(self, what: str) -> Clip:
        """The model, if it is one of open_clip's; else a ValueError: it cannot be `what`."""
        if not isinstance(self.clip, Clip):
            raise ValueError(
                f"{self.name} is a {type(self.clip).__name__}, which can be explained and "
                f"evaluated but not {what}; choose a model of open_clip"
            )
        return self.clip

    @property
    def name(self) -> str:
        """Name of the architecture."""
        return self.architecture.name

    @property
    def image_model(self) -> ImageTextModel:
        """The model; a classifier has it under this name too."""
        return self.clip

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
        return hash_weights(self.clip.model)

    def transform(self, train: bool = False) -> ImageTransform:
        """Picture to normalised pixels; for training a random crop, never a flip."""
        return ImageTransform(self.image_size, self.preprocessing, train)

    def pixels(self, images: Sequence[Image.Image | str | Path]) -> Float[Tensor, "B 3 H W"]:
        """Pictures, or their files, as the model takes them, on its device; see `stack`."""
        return self.transform().stack(images).to(self.clip.device)

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[Image.Image | str | Path], *, batch_size: int = 32
    ) -> Float[Tensor, "B D"]:
        """Unit embeddings of pictures or their files, on the CPU, in fp32; without any no rows."""
        if not images:  # a blank one says how many columns there are
            return self.encode_images([Image.new("RGB", (1, 1))])[:0]
        parts = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        with evaluation_mode(self.clip):
            found = [unit(self.clip.image.encode(self.pixels(part))).cpu() for part in parts]
        return torch.cat(found)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Float[Tensor, "M D"]:
        """Unit embeddings of texts, on the CPU, in fp32; without texts no rows."""
        if not texts:
            return self.encode_texts([""])[:0]
        with evaluation_mode(self.clip):
            return embed_texts(self.clip, self.tokenizer, texts, batch_size).cpu()


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of parameters and buffers, independent of any file format."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def embed_texts(
    clip: ImageTextModel, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int
) -> Float[Tensor, "M D"]:
    """Unit embeddings of at least one text, in fp32, on the model's device."""
    parts = []
    for start in range(0, len(texts), batch_size):
        ids = tokenizer(texts[start : start + batch_size], trim=True)
        parts.append(unit(clip.text.encode(ids.to(clip.device))))
    return torch.cat(parts)


@torch.no_grad()
def class_embeddings(
    clip: ImageTextModel,
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
    sentences = [say(template, name) for name in names for template in templates]
    embedded = embed_texts(clip, tokenizer, sentences, batch_size)
    by_class = embedded.view(len(names), len(templates), -1)  # (K, T, D)
    return unit(by_class.mean(1))


def image_sentence(loaded: LoadedClip) -> str:
    """Blocks, heads, grid and pooling of the image tower, and whether it can be explained."""
    tower, (height, width) = loaded.clip.image, loaded.image_size
    if tower.unexplained is not None:
        return f"encodes only, no heat maps and no dense features: {tower.unexplained}"
    visual = getattr(loaded.clip.model, "visual", loaded.clip.model)
    kind, trunk = type(visual).__name__, getattr(visual, "trunk", None)
    what = kind if trunk is None else f"{kind} around timm's {type(trunk).__name__}"
    return (
        f"{what}: {_parts(tower)}, patch {tower.patch}, grid {height // tower.patch} x "
        f"{width // tower.patch}; maps and dense features at any multiple of the patch"
    )


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
