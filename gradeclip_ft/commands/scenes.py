"""Pictures for the report: captions to phrases, annotations to true boxes, phrases to heat maps.

Which pictures are shown depends on captions and annotations alone, never on what a model makes of
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from gradeclip_ft.data import coco
from gradeclip_ft.data.files import open_image
from gradeclip_ft.explain.base import Explainer, explain_image
from gradeclip_ft.explain.pictures import prepared
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.similarity import cosine
from gradeclip_ft.report.content import Box, Case
from gradeclip_ft.report.figures import enlarge
from gradeclip_ft.text.prompts import phrase_prompt

LONGEST = 512  # pixels of a shown picture
LEAST = 2  # phrases with a true box


@dataclass(frozen=True)
class Scene:
    """A picture with phrases of its first caption that name annotated things, and their boxes.

    Attributes:
        image: Pixels to show.
        caption: First caption.
        phrases: In the order of the caption.
        boxes: All true places of each phrase, xyxy in [0, 1] of the picture.
    """

    image: UInt8[np.ndarray, "H W 3"]
    caption: str
    phrases: tuple[str, ...]
    boxes: tuple[tuple[Box, ...], ...]


@dataclass(frozen=True)
class Maps:
    """What one model makes of one scene."""

    heat: Float[np.ndarray, "P h w"]
    cosine: Float[np.ndarray, " P"]


def find_scenes(
    images: Path, captions: Path, instances: Path, parse: Callable[[str], list[str]], count: int
) -> list[Scene]:
    """The first pictures whose caption names at least two annotated things.

    Args:
        images: Folder of the pictures.
        captions: COCO captions file.
        instances: COCO instances file of the same pictures.
        parse: Caption to phrases.
        count: Pictures at most.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No picture qualifies.
    """
    categories, annotated = coco.read_regions(instances)
    names = [category.name for category in categories]
    pictures = {picture.id: picture for picture in annotated}
    found: list[Scene] = []
    for entry in coco.read_captions(captions):
        if len(found) == count:
            break
        if entry.captions and entry.id in pictures:
            caption = entry.captions[0]
            named = _named(parse(caption), pictures[entry.id], names)
            if len(named) >= LEAST:
                image = _to_show(open_image(images / entry.file_name))
                found.append(Scene(image, caption, tuple(named), tuple(named.values())))
    if not found:
        raise ValueError(
            f"no caption of {captions} names {LEAST} things of {instances}; give files that belong "
            "together"
        )
    return found


def boxes_of(phrase: str, picture: coco.Picture, names: Sequence[str]) -> tuple[Box, ...]:
    """Boxes of all regions whose class name stands in the phrase as whole words."""
    size = (picture.width, picture.height)
    return tuple(
        _relative(region.box, size)
        for region in picture.regions
        if re.search(rf"\b{re.escape(names[region.label].lower())}s?\b", phrase.lower())
    )


def explain_scenes(
    loaded: LoadedClip, explainer: Explainer, scenes: Sequence[Scene], prompt: str
) -> Iterator[Maps]:
    """Heat maps and scores of one model, scene by scene; the picture is squashed to its size."""
    height, width = loaded.image_size
    transform = loaded.transform(train=False)
    method = prepared({"": explainer}, loaded)[""]
    for scene in scenes:
        pixels = transform(Image.fromarray(scene.image).resize((width, height))).unsqueeze(0)
        owner = torch.zeros(len(scene.phrases), dtype=torch.long)
        with torch.no_grad():
            texts = [phrase_prompt(prompt, phrase) for phrase in scene.phrases]
            target = loaded.clip.text.encode(loaded.tokenizer(texts))
            embedding = loaded.clip.image.encode(pixels)
        heat = explain_image(method, loaded.clip, pixels, target, owner)
        yield Maps(heat.numpy(), cosine(embedding[owner], target).numpy())


def to_case(scene: Scene, maps: Mapping[str, Maps]) -> Case:
    """The scene for the page, with each method's heat inside the true boxes in numbers."""
    inside = {
        method: [
            f"{100 * inside_share(heat, boxes):.0f} %"
            for heat, boxes in zip(made.heat, scene.boxes, strict=True)
        ]
        for method, made in maps.items()
    }
    scores = {
        method: [f"{score:.2f}".replace("-", "−") for score in made.cosine]
        for method, made in maps.items()
    }
    return Case(
        image=scene.image,
        phrases=scene.phrases,
        heat={method: made.heat for method, made in maps.items()},
        caption=scene.caption,
        boxes=scene.boxes,
        values={"in the box": inside, "cosine": scores},
    )


def inside_share(heat: Float[np.ndarray, "h w"], boxes: Sequence[Box], side: int = 128) -> float:
    """Share of the positive heat that lies in any of the boxes; 0 where there is no heat.

    Args:
        heat: On the patch grid; it is enlarged as for the page.
        boxes: xyxy in [0, 1].
        side: Pixels of the raster on which it is counted.
    """
    fine = enlarge(np.maximum(heat, 0.0), (side, side))
    centres = (np.arange(side) + 0.5) / side
    mask = np.zeros((side, side), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        rows, columns = (centres >= y0) & (centres < y1), (centres >= x0) & (centres < x1)
        mask |= rows[:, None] & columns[None, :]
    total = float(fine.sum())
    return float(fine[mask].sum()) / total if total > 0 else 0.0


def _named(
    phrases: Sequence[str], picture: coco.Picture, names: Sequence[str]
) -> dict[str, tuple[Box, ...]]:
    boxes = {phrase: boxes_of(phrase, picture, names) for phrase in phrases}
    return {phrase: places for phrase, places in boxes.items() if places}


def _relative(box: tuple[float, float, float, float], size: tuple[int, int]) -> Box:
    """From xywh in pixels to xyxy in [0, 1]."""
    x, y, width, height = box
    return x / size[0], y / size[1], (x + width) / size[0], (y + height) / size[1]


def _to_show(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels at a size that keeps the page small."""
    if max(picture.size) > LONGEST:
        picture = picture.copy()
        picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return np.asarray(picture)
