"""A COCO-format world whose pixels tell the class, and models that read them: perfect or blind."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gradeclip_ft.models.architecture import Architecture
from gradeclip_ft.models.clip import Clip, LoadedClip, Preprocessing
from gradeclip_ft.models.tokenizer import Tokenizer
from gradeclip_ft.models.trace import Layer, Pass, UnsupportedTowerError, patch_tokens

THINGS = tuple(f"thing {n}" for n in range(12))
STUFF = tuple(f"stuff {n}" for n in range(5))
NAMES = THINGS + STUFF
SIZES = ((300, 200), (200, 300), (256, 256), (427, 640), (333, 160), (90, 400))


def colour_of(label: int) -> tuple[int, int, int]:
    """One of 63 colours 85 grey levels apart; black is the padding."""
    code = label * 3 + 1
    return (code % 4 * 85, code // 4 % 4 * 85, code // 16 * 85)


@dataclass(frozen=True)
class World:
    """Files of a small panoptic and captions data set, and what they hold."""

    folder: Path
    rectangles: dict[str, list[tuple[int, int, int, int, int]]]  # name: label, x, y, w, h

    @property
    def panoptic(self) -> dict[str, str]:
        return {
            "annotations": str(self.folder / "panoptic.json"),
            "images": str(self.folder / "images"),
            "segments": str(self.folder / "segments"),
        }

    @property
    def captions(self) -> dict[str, str]:
        return {
            "annotations": str(self.folder / "captions.json"),
            "images": str(self.folder / "images"),
        }


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """18 pictures of six shapes, each cut into four rectangles of three things and stuff.

    Every picture has two captions, "main N" and "second N" for the labels of its first regions.
    """
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    for name in ("images", "segments"):
        (folder / name).mkdir()
    images, annotations, captions, rectangles = [], [], [], {}
    for number in range(18):
        height, width = SIZES[number % len(SIZES)]
        cut_x = round(width * random.uniform(0.4, 0.6))
        cut_y = round(height * random.uniform(0.4, 0.6))
        labels = [number % len(THINGS), (number * 5 + 1) % len(THINGS), (number * 7 + 2) % 12]
        labels = [*dict.fromkeys(labels), len(THINGS) + number % len(STUFF)]
        quarters = [
            (0, 0, cut_x, cut_y),
            (cut_x, 0, width - cut_x, cut_y),
            (0, cut_y, cut_x, height - cut_y),
            (cut_x, cut_y, width - cut_x, height - cut_y),
        ]
        pixels = np.zeros((height, width, 3), np.uint8)
        colours = np.zeros((height, width, 3), np.uint8)
        segments, found = [], []
        for place, (label, (x, y, w, h)) in enumerate(zip(labels, quarters, strict=False)):
            code = 65000 + number * 300 + place
            pixels[y : y + h, x : x + w] = colour_of(label)
            colours[y : y + h, x : x + w] = (code % 256, code // 256 % 256, code // 65536)
            bbox = [x, y, w, h]
            segments.append({"id": code, "category_id": label * 2 + 1, "bbox": bbox, "iscrowd": 0})
            found.append((label, x, y, w, h))
        name = f"{number:012d}"
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        Image.fromarray(colours).save(folder / "segments" / f"{name}.png")
        images.append({"id": number, "file_name": f"{name}.png", "height": height, "width": width})
        annotations.append(
            {"image_id": number, "file_name": f"{name}.png", "segments_info": segments}
        )
        captions += [
            {"image_id": number, "caption": f"picture {number}"},
            {"image_id": number, "caption": f"again picture {number}"},
        ]
        rectangles[f"{name}.png"] = found
    categories = [
        {"id": label * 2 + 1, "name": name, "isthing": int(label < len(THINGS))}
        for label, name in enumerate(NAMES)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "panoptic.json").write_text(json.dumps(content))
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return World(folder, rectangles)


@dataclass
class Reader:
    """An image tower that reads the class of every patch from its colour.

    A token holds, for each class, the share of its pixels in that colour.
    """

    patch: int
    blind: bool = False
    whole: bool = False
    unexplained: None = None

    def dense(self, images: Tensor) -> Tensor:
        how = Preprocessing()
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (how.mean, how.std))
        pixels = (images.float() * std + mean).permute(0, 2, 3, 1)  # (B, H, W, 3)
        levels = (pixels * 3).round()
        clear = (pixels - levels / 3).abs().amax(-1) < 0.08
        code = (levels @ torch.tensor([1.0, 4.0, 16.0])).where(clear, 0)  # inverse of colour_of
        share = torch.stack(
            [
                torch.nn.functional.avg_pool2d((code == 3 * label + 1).float(), self.patch)
                for label in range(len(NAMES))
            ],
            dim=-1,
        )
        if self.blind:
            generator = torch.Generator().manual_seed(int(images.shape[0]))
            return torch.randn(share.shape, generator=generator)
        return share

    def trace(self, images: Tensor) -> SimpleNamespace:
        assert not torch.is_grad_enabled()
        return SimpleNamespace(dense=lambda path="value": self.dense(images))

    def open(self, images: Tensor) -> Pass:
        """As a real pass, whose last layer leaves every token as it is."""
        dense = self.dense(images)  # (B, h, w, K)
        layer = Layer(
            attend=lambda rows, pick: (pick(rows), rows, rows),
            finish=lambda x, o: o,
            add=lambda o: o,
            project=lambda o: o,
            heads=1,
            run=None,
        )
        tokens, grid = dense.flatten(1, 2), (dense.shape[1], dense.shape[2])
        first = torch.zeros(len(dense), dtype=torch.long)
        return Pass(tokens, (layer,), lambda rows: rows, first, patch_tokens(tokens, grid), grid)

    def encode(self, images: Tensor) -> Tensor:
        """The mean colour at a coarse grid: every picture of the world has its own.

        With `whole` the share of each class in the picture.
        """
        if self.whole:
            return self.dense(images).mean((1, 2))
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 8).flatten(1)


class Names:
    """A text tower that knows the class names: one axis each."""

    def __init__(self, table: Tensor | None = None) -> None:
        self.table = torch.eye(len(NAMES)) if table is None else table
        self.rows = 0

    def encode(self, tokens: Tensor) -> Tensor:
        self.rows += len(tokens)
        return self.table[tokens[:, 1]]


class FakeClip(Clip):
    """A `Clip` with other towers; one layer is in training mode, one is not."""

    def __init__(self, image: Reader, text: Names) -> None:
        nn.Module.__init__(self)
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.model.register_parameter("logit_scale", nn.Parameter(torch.zeros(())))
        self.model.train()
        self.model[0].eval()
        self.image = image  # type: ignore[assignment]
        self.text = text  # type: ignore[assignment]


def number_in(texts: list[str]) -> Tensor:
    """Ids [start, number of the class or picture, end]; things first, then stuff."""
    rows = []
    for text in texts:
        number = int(re.findall(r"[0-9]+", text)[-1])
        rows.append([98, number + (len(THINGS) if "stuff" in text else 0), 99, 0, 0, 0])
    return torch.tensor(rows)


Load = Callable[..., LoadedClip]


@pytest.fixture
def load() -> Load:
    """Build a model: `load(size=224, patch=16, table=None, blind=False, whole=False)`."""

    def build(
        size: int = 224, patch: int = 16, *, table: Tensor | None = None, **how: bool
    ) -> LoadedClip:
        return LoadedClip(
            clip=FakeClip(Reader(patch, **how), Names(table)),
            tokenizer=Tokenizer(number_in, 6),
            preprocessing=Preprocessing(resize="squash"),
            image_size=(size, size),
            architecture=Architecture("fake", {}, {}),
        )

    return build


def said_to(loaded: LoadedClip) -> list[str]:
    """The sentences that reach the text tower from now on."""
    said: list[str] = []
    tokenize = loaded.tokenizer.tokenize
    object.__setattr__(
        loaded.tokenizer, "tokenize", lambda texts: [said.extend(texts), tokenize(texts)][1]
    )
    return said


@dataclass(frozen=True)
class Unable:
    """A method that this tower cannot do."""

    images_only: ClassVar[bool] = True

    def from_input(self, tower: Any, x: Tensor, target: Tensor, owner: Tensor) -> Tensor:
        raise UnsupportedTowerError("this tower has no such layer")


def modes(clip: nn.Module) -> Sequence[bool]:
    """Mode of every layer."""
    return [module.training for module in clip.modules()]
