"""Pictures and phrases to maps, by several methods on the same pixels and the same text vectors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from gradeclip_ft.explain.base import Explainer, explain_image
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.tower import UnsupportedTowerError
from gradeclip_ft.models.transform import ImageTransform

Geometry = Literal["model", "aspect"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Explained:
    """What a model makes of one picture.

    Attributes:
        pixels: The normalised pixels that every method saw.
        heat: Maps by method.
        score: Cosine of picture and phrase.
    """

    pixels: Float[Tensor, "3 H W"]
    heat: Mapping[str, Float[Tensor, "P h w"]]
    score: Float[Tensor, " P"]


def transform_for(
    loaded: LoadedClip, picture: Image.Image, geometry: Geometry, longest: int
) -> ImageTransform:
    """How a picture becomes pixels.

    Args:
        loaded: The model.
        picture: The picture.
        geometry: The model's own resize and crop; or `aspect`, as the Grad-ECLIP authors do: each
            side brought to the nearest multiple of the patch, nothing cropped.
        longest: Pixels of the longer side under `aspect`, at most.

    Raises:
        ValueError: The model takes pictures of one size only.
    """
    if geometry == "model":
        return loaded.transform()
    patch = loaded.patch
    if not patch:
        raise ValueError(f"{loaded.name} takes pictures of one size; choose geometry=model")
    scale = min(1.0, longest / max(picture.size))
    width, height = (max(1, round(side * scale / patch)) * patch for side in picture.size)
    how = loaded.preprocessing
    whole = type(how)(how.mean, how.std, how.interpolation, resize="squash")
    return ImageTransform(size=(height, width), preprocessing=whole)


def explain_picture(
    loaded: LoadedClip,
    picture: Image.Image,
    target: Float[Tensor, "P D"],
    methods: Mapping[str, Explainer],
    *,
    geometry: Geometry = "model",
    longest: int = 640,
    skip: bool = False,
) -> Explained:
    """Maps of every phrase by every method.

    Args:
        loaded: The model, on its device.
        picture: Any size and mode.
        target: Embeddings of the phrases.
        methods: By name; those with texts of their own are already prepared.
        geometry: See `transform_for`.
        longest: See `transform_for`.
        skip: Leave out, with a word in the log, what this model cannot do.

    Raises:
        UnsupportedTowerError: The model cannot do a method and `skip` is false, or it can do none.
    """
    device = loaded.clip.log_scale.device
    pixels = transform_for(loaded, picture, geometry, longest)(picture).to(device)
    owner = torch.zeros(len(target), dtype=torch.long, device=device)
    heat: dict[str, Tensor] = {}
    for name, method in methods.items():
        try:
            heat[name] = explain_image(method, loaded.clip, pixels[None], target, owner).cpu()
        except (UnsupportedTowerError, ValueError) as error:
            if not skip:
                raise
            log.warning("%s is left out: %s", name, error)
    if not heat:
        raise UnsupportedTowerError(f"{loaded.name} can do none of {', '.join(methods)}")
    with torch.no_grad():
        embedding = torch.nn.functional.normalize(loaded.clip.image.encode(pixels[None]).float())
    score = torch.nn.functional.normalize(target.float().to(device)) @ embedding[0]
    return Explained(pixels.cpu(), heat, score.cpu())


def prepared(methods: Mapping[str, Explainer], loaded: LoadedClip) -> dict[str, Explainer]:
    """Methods that compare with texts of their own, with these encoded by this model."""
    return {
        name: method.prepare(loaded) if hasattr(method, "prepare") else method
        for name, method in methods.items()
    }


def shown(pixels: Float[Tensor, "3 H W"], loaded: LoadedClip) -> Tensor:
    """The picture as the model saw it, (H, W, 3) in bytes: maps belong on this one."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (loaded.mean, loaded.std))
    return ((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)


def check_phrases(phrases: Sequence[str]) -> None:
    """Refuse phrases without a word.

    Raises:
        ValueError: There is none, or one is empty.
    """
    if not phrases or any(not phrase.strip() for phrase in phrases):
        raise ValueError(
            f"phrases are {list(phrases)}, expected texts; write phrases=[dog,'red car']"
        )
